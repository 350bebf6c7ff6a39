"""The fault table on llama.cpp's own server: real model, real processes, real frontend."""

from __future__ import annotations

from conftest import PATIENT
from dynamo_worker.testing.fault_table import FaultTable


class TestLlamaCpp(FaultTable):
    #: Streams take from one second, on a machine with nothing else to do, to half a minute.
    GRACE = ("--grace-period", "0.3", *PATIENT)
