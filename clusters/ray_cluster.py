"""Several machines of a Ray cluster: one torchrun on each, a rank for each GPU.

    ray job submit --working-dir . -- python clusters/ray_cluster.py --model Qwen/Qwen3-4B --data /shared/my.jsonl \
        --output /shared/run

Ray Train would make a process group of its own, so these are plain tasks. MACHINES and GPUS say how many. Rows and run
folder are on a file system that all machines share.
"""

import os
import subprocess
import sys

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

MACHINES, GPUS = int(os.environ.get("MACHINES", "2")), int(os.environ.get("GPUS", "8"))


@ray.remote(num_cpus=1, num_gpus=GPUS)
def address() -> str:
    return ray.util.get_node_ip_address()


@ray.remote(num_cpus=1, num_gpus=GPUS, max_retries=0)
def torchrun(number: int, head: str, job: str, words: list[str]) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={MACHINES}", f"--nproc-per-node={GPUS or 1}"]
    program += ["--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}:29500", f"--rdzv-id={job}"]
    program.append(f"--rdzv-conf=is_host={number == 0}")
    subprocess.run([*program, "cli.py", "train", *words], check=True)


if __name__ == "__main__":
    machines = ray.util.placement_group([{"CPU": 1, "GPU": GPUS}] * MACHINES, strategy="SPREAD")
    places = [PlacementGroupSchedulingStrategy(machines, n) for n in range(MACHINES)]
    head = ray.get(address.options(scheduling_strategy=places[0]).remote())
    job = ray.get_runtime_context().get_job_id()
    ray.get(
        [torchrun.options(scheduling_strategy=on).remote(n, head, job, sys.argv[1:]) for n, on in enumerate(places)]
    )
