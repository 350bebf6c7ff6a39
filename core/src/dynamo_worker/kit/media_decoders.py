"""The processes that decode images, each one image at a time: a decoder that hangs, bombs or dies harms one request.

Files and pixels are handed over in anonymous memory (``memfd_create``), sealed so that no process can change or shorten
what another one reads. Nothing is left behind: it goes with the last descriptor, and a decoder goes with the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import StartError
from dynamo_worker.kit.media_decoder_main import MESSAGE_BYTES
from dynamo_worker.kit.media_settings import PIXEL_BYTES
from dynamo_worker.kit.media_urls import MediaError
from dynamo_worker.kit.python_command import python_command
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from dynamo_worker.kit.media_settings import MediaSettings

log = get_logger(__name__)

_PROGRAM: Final = "dynamo_worker.kit.media_decoder_main"
#: Seconds in which a decoder starts; a busy machine takes long.
_START_SECONDS: Final = 60.0
#: Seconds in which a killed process must be gone.
_END_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.01
#: Bytes that are copied at once on the event loop.
_STEP: Final = 2**20
_UNCHANGEABLE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FINISHED: Final = fcntl.F_SEAL_WRITE | _UNCHANGEABLE


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    :param format: ``PNG``, ``JPEG``, ``WEBP`` or ``GIF``.
    :param width: in pixels.
    :param height: in pixels.
    """

    format: str
    width: int
    height: int

    @property
    def size(self) -> int:
        """Bytes of the decoded pixels."""
        return self.width * self.height * PIXEL_BYTES


@dataclass(frozen=True)
class DecodedImage:
    """An image whose pixels are in memory that nobody can change.

    :param header: format, width and height.
    :param pixels: red, green and blue of each pixel, the top row first.
    """

    header: Header
    pixels: memoryview

    @property
    def size(self) -> int:
        """Bytes of the pixels."""
        return self.header.size


class FileInMemory:
    """A file for a decoder. Close it."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    async def write(self, data: bytes) -> None:
        """Write the content, in steps between which the event loop goes on, and seal it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view[:_STEP]) :]
            await asyncio.sleep(0)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _FINISHED)

    def resize(self, size: int) -> None:
        """Make room for content that a decoder writes."""
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def finished(self) -> memoryview:
        """Seal what a decoder has written, and return it.

        :raises OSError: the decoder can still write.
        """
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _FINISHED)
        size = os.fstat(self.descriptor).st_size
        if size <= _STEP:  # a map keeps a descriptor, and a cache may hold many small images
            return memoryview(os.pread(self.descriptor, size, 0))
        return memoryview(mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ))

    def close(self) -> None:
        """Drop the descriptor; the memory stays as long as somebody reads it."""
        os.close(self.descriptor)


class _EndedError(Exception):
    """A decoder process has ended without an answer."""


class Decoders:
    """The decoder processes of one worker."""

    def __init__(self, settings: MediaSettings) -> None:
        """Start nothing yet."""
        self._settings = settings
        self._places = asyncio.Semaphore(settings.decoders)
        self._idle: list[_Decoder] = []
        self._busy: set[_Decoder] = set()
        self._closed = False

    def processes(self) -> list[int]:
        """Return the pids of the decoders."""
        return [decoder.pid for decoder in (*self._idle, *self._busy)]

    async def start(self) -> None:
        """Start all processes, so that the first request need not wait for one.

        :raises StartError: one does not start.
        """
        started = [_Decoder(self._settings) for _ in range(self._settings.decoders)]
        self._idle += started
        try:
            await asyncio.gather(*(decoder.ready() for decoder in started))
        except BaseException:
            await self.close()
            raise

    async def probe(self, file: FileInMemory, waits: Callable[[str | None], None]) -> Header:
        """Return what the header of an image says.

        :param waits: called with what this waits for, and with None when it goes on.
        :raises MediaError: it is no image, or beyond a limit.
        """
        answer = await self._ask("probe", [file.descriptor], waits)
        with contextlib.suppress(KeyError, TypeError, ValueError):  # the process may have been taken over
            header = Header(str(answer["format"])[:8], int(answer["width"]), int(answer["height"]))
            if 0 < header.width * header.height <= self._settings.max_pixels and header.width > 0:
                return header
        raise MediaError("its decoder gave no sensible answer")

    async def decode(self, file: FileInMemory, header: Header, waits: Callable[[str | None], None]) -> DecodedImage:
        """Decode an image.

        :raises MediaError: it is broken.
        """
        target = FileInMemory()
        try:
            target.resize(header.size)
            await self._ask("decode", [file.descriptor, target.descriptor], waits)
            try:
                return DecodedImage(header, target.finished())
            except OSError:
                raise MediaError("its decoder still holds the pixels") from None
        finally:
            target.close()

    async def _ask(self, job: str, descriptors: list[int], waits: Callable[[str | None], None]) -> dict[str, Any]:
        try:
            answer = await self._once(job, descriptors, waits)
        except _EndedError:  # perhaps for another reason than this image
            try:
                answer = await self._once(job, descriptors, waits)
            except _EndedError:
                raise MediaError("it has ended its decoder, and another one") from None
        if "refused" in answer:
            raise MediaError(str(answer["refused"])[:500])
        return answer

    async def _once(self, job: str, descriptors: list[int], waits: Callable[[str | None], None]) -> dict[str, Any]:
        limits = {"job": job, "pixels": self._settings.max_pixels, "frames": self._settings.max_frames}
        async with self._decoder(waits) as decoder:
            try:
                return await asyncio.wait_for(decoder.ask(limits, descriptors), self._settings.decode_timeout)
            except asyncio.TimeoutError:
                why = f"decoding it takes more than {self._settings.decode_timeout:g} s (--media-decode-timeout)"
                raise MediaError(why) from None
            except (_EndedError, OSError, ValueError):
                how = await decoder.end()
                log.warning("A decoder for images has ended", how=how, next="another decoder")
                raise _EndedError from None

    @contextlib.asynccontextmanager
    async def _decoder(self, waits: Callable[[str | None], None]) -> AsyncIterator[_Decoder]:
        """Wait for a decoder; it is killed if the block ends while it still has work."""
        if self._places.locked():
            waits(f"one of {self._settings.decoders} decoders (--media-decoders)")
        async with self._places:
            decoder = await self._next()
            self._busy.add(decoder)
            try:
                await decoder.ready()
                waits(None)
                yield decoder
            finally:
                self._busy.discard(decoder)
                if decoder.is_idle and not self._closed:
                    self._idle.append(decoder)
                else:
                    await asyncio.shield(decoder.end())

    async def _next(self) -> _Decoder:
        """Return a decoder that is alive: somebody may have killed one that was idle."""
        while self._idle:
            decoder = self._idle.pop()
            if decoder.is_alive:
                return decoder
            how = await decoder.end()
            log.warning("An idle decoder for images has ended", how=how, next="another decoder")
        return _Decoder(self._settings)

    async def close(self) -> None:
        """Kill all processes."""
        self._closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*(decoder.end() for decoder in (*idle, *self._busy)))


class _Decoder:
    """One decoder process.

    :ivar is_idle: whether it waits for a job.
    """

    def __init__(self, settings: MediaSettings) -> None:
        """Start it. From the event loop's thread: the kernel kills it when the thread that has started it ends."""
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setblocking(False)
        with theirs:
            command = [*python_command(_PROGRAM), str(theirs.fileno()), str(os.getpid()), str(settings.max_pixels)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self.is_idle = False

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    async def ready(self) -> None:
        """Wait until it takes jobs.

        :raises StartError: it does not start.
        """
        if self.is_idle:
            return
        try:
            answer = await asyncio.wait_for(self._answer(), _START_SECONDS)
        except asyncio.TimeoutError:
            raise StartError(f"a decoder for images did not start within {_START_SECONDS:g} s") from None
        except (_EndedError, OSError, ValueError):
            how = await self.end()
            raise StartError(f"a decoder for images does not start: {how}") from None
        if "failed" in answer:
            raise StartError(str(answer["failed"]), hint="pip install 'dynamo-worker[media]'")
        self.is_idle = True

    async def ask(self, job: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Let it do a job, and return the answer."""
        self.is_idle = False
        socket.send_fds(self._connection, [json.dumps(job).encode()], descriptors)
        answer = await self._answer()
        self.is_idle = True
        return answer

    async def _answer(self) -> dict[str, Any]:
        message = await asyncio.get_running_loop().sock_recv(self._connection, MESSAGE_BYTES)
        if not message:
            raise _EndedError
        answer = json.loads(message)
        if not isinstance(answer, dict):
            raise ValueError("no object")
        return answer

    async def end(self) -> str:
        """Kill it, and return how it ended."""
        self.is_idle = False
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        waited = 0.0
        while self._process.poll() is None and waited < _END_SECONDS:
            await asyncio.sleep(_POLL_SECONDS)
            waited += _POLL_SECONDS
        code = self._process.returncode
        if code is None:
            return "still there"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
