"""Prints what a tracker has stored of a run, as JSON, read by the tracker's own library; runs in its environment.

usage: stored.py TRACKER RUN

`figures`: by name, the `[step, value]` of each point. `config`, `texts`, `files`; `all`: every string anywhere.
"""

import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Stored = dict[str, Any]
_BLOCK, _HEADER = 32768, 7  # of a LevelDB log


def tensorboard(run: Path, tracker_id: str) -> Stored:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.util.tensor_util import make_ndarray

    found = EventMultiplexer(size_guidance={"tensors": 0})
    found.AddRunsFromDirectory(str(run.parent), None)
    found.Reload()
    name = f"{run.name}/tensorboard"
    points: Stored = {"figures": {}, "texts": [], "files": []}
    for tag in found.Runs()[name]["tensors"]:
        for event in found.Tensors(name, tag):
            if tag.startswith("_hparams_"):
                continue
            value = make_ndarray(event.tensor_proto)
            if value.dtype == object:
                points["texts"].append(f"{tag}: {b''.join(value.flat).decode()}")
            else:
                points["figures"].setdefault(tag, []).append([event.step, float(value)])
    config = next(text for text in points["texts"] if text.startswith("config:"))
    points["texts"].remove(config)
    return points | {"config": dict(re.findall(r"^ {4}(\w+): (.*)$", config.replace("config: ", "", 1), re.M))}


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log, whose first block begins with a header of its own."""
    data, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        parts += data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (1, 4):  # complete, or its last part
            yield parts
            parts = b""


def wandb(run: Path, tracker_id: str) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Stored = {"figures": {}, "texts": [], "files": [], "config": {}, "ids": set()}
    for file in sorted(run.parent.glob("wandb/offline-run-*/*.wandb")):
        for content in log_records(file):
            record = Record()
            record.ParseFromString(content)
            for item in record.run.config.update:
                found["config"][item.key] = json.loads(item.value_json)
            found["ids"] |= {record.run.run_id} - {""}
            line = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            values = {name: json.loads(value) for name, value in line.items()}
            for name, value in values.items():
                if isinstance(value, int | float) and name[0] != "_" and name != "step":
                    found["figures"].setdefault(name, []).append([values["step"], value])
            found["files"] += [entry.path for entry in record.request.log_artifact.artifact.manifest.contents]
            found["files"] += [entry.path for entry in record.artifact.manifest.contents]
    assert found.pop("ids") == {tracker_id}
    tables = [path.read_text() for path in run.parent.glob("wandb/**/*.table.json")]
    return found | {"texts": [str(cell) for table in tables for row in json.loads(table)["data"] for cell in row]}


def mlflow(run: Path, tracker_id: str) -> Stored:
    from mlflow import MlflowClient
    from mlflow.artifacts import load_dict

    client = MlflowClient()
    found = client.get_run(tracker_id)
    histories = {name: client.get_metric_history(tracker_id, name) for name in found.data.metrics}
    files = [file.path for folder in (None, "adapter") for file in client.list_artifacts(tracker_id, folder)]
    table = load_dict(f"{found.info.artifact_uri}/samples.json")["data"] if "samples.json" in files else []
    return {
        "figures": {name: [[point.step, point.value] for point in points] for name, points in histories.items()},
        "config": found.data.params,
        "files": [file for file in files if file != "samples.json"],
        "texts": [str(cell) for row in table for cell in row],
        "tags": found.data.tags,
    }


def trackio(run: Path, tracker_id: str) -> Stored:
    from trackio.sqlite_storage import SQLiteStorage

    project = os.environ.get("TRACKIO_PROJECT", "twintune")
    lines = SQLiteStorage.get_logs(project, tracker_id)
    figures: dict[str, list] = {}
    texts: list[str] = []
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                figures.setdefault(name, []).append([line["step"], value])
            elif isinstance(value, dict):
                texts += [str(cell) for row in value["_value"] for cell in row.values()]
    blobs = Path(os.environ["TRACKIO_DIR"]).glob("artifacts/**/blobs/**/*")
    return {
        "figures": figures,
        "texts": texts,
        "files": [path.name for path in blobs if path.is_file()],
        "config": SQLiteStorage.get_run_config(project, tracker_id),
    }


def swanlab(run: Path, tracker_id: str) -> Stored:
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: Stored = {"figures": {}, "texts": [], "files": [], "config": {}}
    folders = sorted(run.parent.glob(f"swanlog/run-*-{tracker_id}"))  # offline each process has one
    for folder in folders:
        reader = DataStoreReader()
        reader.open(folder / f"run-{tracker_id}.swanlab")
        for content in reader:
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "scalar":
                point = [record.scalar.step, record.scalar.value.number]
                found["figures"].setdefault(record.scalar.key, []).append(point)
        config = yaml.safe_load((folder / "files" / "config.yaml").read_text())
        found["config"] = {name: item["value"] for name, item in config.items()}
        found["texts"] += [path.read_text() for path in sorted(folder.glob("media/text/*"))]
        found["files"] += [str(path.relative_to(folder)) for path in folder.glob("kept/**/*") if path.is_file()]
    return found


if __name__ == "__main__":
    run = Path(sys.argv[2])
    tracker_id = json.loads((run / "run.json").read_text()).get("trackers", {}).get(sys.argv[1], "")
    print(json.dumps(globals()[sys.argv[1]](run, tracker_id)))
