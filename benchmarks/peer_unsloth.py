"""One run of Unsloth on a GPU, with a `job` as `benchmarks.peers` makes it; it imports nothing of Twintune.

    PYTHONPATH=unsloth-site python3 benchmarks/peer_unsloth.py "$(cat job.json)"

Its own recipe for LoRA: FastLanguageModel in bf16, all seven projections, TRL's SFTTrainer as Unsloth patches it, which
by itself drops the padding. The job may hold more: `"quantization": "nf4"`, `"checkpointing": "unsloth"`, an
`"optimizer"`, `"xformers": false` for none, and an `"environment"`, set before the import. Touches no network. The last
line printed is JSON: the seconds of each step, the most bytes allocated and reserved on the GPU, each step's loss.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

JOB = json.loads(sys.argv[1])
SCRATCH = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_FORCE_SINGLE_COMPILE_WORKER": "0",
    "UNSLOTH_COMPILE_LOCATION": str(Path(SCRATCH.name, "unsloth_compiled_cache")),
    **JOB.get("environment", {}),
}
if JOB.get("xformers", True):
    beside = Path(importlib.util.find_spec("unsloth").origin).parent.parent / "with-xformers"
    sys.path.insert(0, str(beside))  # where there is no such folder, an xformers that is installed
    with contextlib.suppress(OSError):
        ctypes.CDLL(str(beside / "libcudart.so.12"))  # the wheel on PyPI is built for CUDA 12

import unsloth  # noqa: E402, F401, I001  before TRL and transformers, which it patches
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    def __init__(self):
        self.marks = []
        self.losses = []

    def mark(self, *_, **__):
        torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    on_step_begin = on_train_end = mark

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def main(job):
    clock = Clock()
    with open(job["data"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    checkpointing = {"use_gradient_checkpointing": job.get("checkpointing", False)}
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=1024,
        dtype=torch.bfloat16,
        load_in_4bit=job.get("quantization") == "nf4",
        use_exact_model_name=True,
        local_files_only=True,
        trust_remote_code=False,
        **checkpointing,
    )
    lora = {"r": job["rank"], "lora_alpha": 2 * job["rank"], "lora_dropout": 0, "bias": "none", "random_state": 0}
    model = FastLanguageModel.get_peft_model(model, target_modules=PROJECTIONS, **lora, **checkpointing)
    config = SFTConfig(
        output_dir=job["output"],
        max_length=1024,
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim=job.get("optimizer", "adamw_torch_fused"),
        weight_decay=0.0,
        bf16=True,
        completion_only_loss="text" not in rows[0],
        dataset_num_proc=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
    )
    how = {"processing_class": tokenizer, "callbacks": [clock]}
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), **how)
    trainer.train()
    trainer.model.save_pretrained(job["output"])
    seconds = [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(json.dumps({"seconds": seconds, "peak": peak, "reserved": reserved, "losses": clock.losses}))


main(JOB)
