"""One run of a PyTorch peer, started by `benchmarks.peers` with the peer's own Python: it imports nothing of Twintune.

`trl` is SFTTrainer as it comes, `trl-best` at the settings that served it best here, `padded` the recipe of many
tutorials: HF's Trainer, every row padded to 512 tokens, no attention mask, eager attention. Prints one JSON
line: the seconds of each step and, on a GPU, the allocator's peak.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    def __init__(self):
        self.marks = []

    def on_step_begin(self, args, state, control, **_):
        self.marks.append(time.perf_counter())

    def on_train_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def main(job):
    clock = Clock()
    with open(job["data"]) as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(
        r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    common = {
        "output_dir": job["output"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10_000,
        "seed": 0,
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
    }
    if job["peer"] == "padded":
        model = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        model = get_peft_model(model, lora)
        texts = [
            row["text"]
            if "text" in row
            else tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            for row in rows
        ]
        ids = [tokenizer(text, truncation=True, padding="max_length", max_length=512)["input_ids"] for text in texts]
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(model, TrainingArguments(**common), train_dataset=data, callbacks=[clock])
    else:
        from trl import SFTConfig, SFTTrainer

        if job["peer"] == "trl-best":
            bf16 = job["precision"] == "bf16"
            common |= {"bf16": bf16, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
            dtype = "bfloat16" if bf16 else "float32"
            common |= {"use_liger_kernel": job["device"] == "cuda"}
            common |= {"model_init_kwargs": {"dtype": dtype, "attn_implementation": "sdpa"}}
        config = SFTConfig(**common, max_length=1024)
        how = {"processing_class": tokenizer, "peft_config": lora, "callbacks": [clock]}
        trainer = SFTTrainer(job["model"], args=config, train_dataset=Dataset.from_list(rows), **how)
    trainer.train()
    trainer.model.save_pretrained(job["output"])
    seconds = [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if job["device"] == "cuda" else 0}))


main(json.loads(sys.argv[1]))
