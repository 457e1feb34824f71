"""python -m tests.parity.record: write common/verify/parity_reference.json again, after a change that is meant to."""

from common.verify.parity import RECORD, record
from tests.contexts import context

if __name__ == "__main__":
    record(context().backends)
    print(f"{RECORD} is written")
