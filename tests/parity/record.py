"""python -m tests.parity.record: write common/verify/parity_reference.json again, after a change that is meant to."""

from common.verify.parity import RECORD, record
from tests.backends import create

if __name__ == "__main__":
    record(create)
    print(f"{RECORD} is written")
