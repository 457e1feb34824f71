"""python -m tests.parity.record: write common/parity_numbers.json anew, after a change that is meant to change them."""

from common.parity_check import RECORD, record
from tests.backends import create

if __name__ == "__main__":
    record(create)
    print(f"{RECORD} is written")
