"""One process, or several that torchrun or SLURM's srun has started: who computes where, and who goes first."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

from tokenseg.config import Plan
from tokenseg.device import bfloat16_helps
from tokenseg.errors import ConfigError, TrainingError
from tokenseg.processes import num_processes

# While the first process prepares or validates, the others wait in a collective operation. The customary limits of 10
# and 30 minutes would end a large training there; a process that died is noticed by the launcher.
LONGEST_WAIT = timedelta(days=1)

ResultT = TypeVar("ResultT")


class _Launched(NamedTuple):
    """What a launcher has started."""

    environment: ClusterEnvironment
    per_node: int
    nodes: int


def open_fabric(device: torch.device) -> Fabric:
    """One process, unless torchrun or srun has started several.

    Raises:
        ConfigError: srun has started tasks without saying how many on each node.
    """
    launched = _launched()
    is_alone = launched.per_node * launched.nodes == 1
    fabric = Fabric(
        accelerator=device.type,
        devices=launched.per_node,
        num_nodes=launched.nodes,
        strategy="auto" if is_alone else DDPStrategy(timeout=LONGEST_WAIT),
        plugins=[launched.environment],
        precision="bf16-mixed" if bfloat16_helps(device) else "32-true",
    )
    fabric.launch()
    if fabric.world_size > 1:
        # Threads of the gloo backend, left to the interpreter's exit, now and then abort a process whose work is done.
        atexit.register(_leave_group)
    return fabric


def first_then_others(fabric: Fabric, work: Callable[[], ResultT]) -> ResultT:
    """Do `work` in the first process, then in all others, which find what it has written.

    Raises:
        TokenSegError: What `work` raised; in the other processes a note that the first one failed.
    """
    if fabric.is_global_zero:
        try:
            result = work()
        except BaseException:
            fabric.broadcast(False)  # whatever it was: the others would wait for a day
            raise
        fabric.broadcast(True)
        return result
    if not fabric.broadcast(True):
        raise TrainingError("the first process failed; its message says why")
    return work()


def check_divides(plan: Plan) -> None:
    """Refuse a batch of which not every process would get the same share.

    Raises:
        ConfigError: The batch does not divide; the message says what to change.
    """
    count = num_processes()
    if plan.batch_size % count:
        enough = -(-plan.batch_size // count) * count
        fitting = [str(number) for number in range(1, plan.batch_size + 1) if plan.batch_size % number == 0]
        raise ConfigError(
            f"a batch of {plan.batch_size} windows does not divide among {count} processes; start "
            f"{' or '.join(fitting)} of them, or a new run with, say, batch_size = {enough} under [plan] in a --config "
            "file"
        )


def _launched() -> _Launched:
    given = os.environ
    if int(given.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" in given:
        per_node = int(given["LOCAL_WORLD_SIZE"])
        return _Launched(TorchElasticEnvironment(), per_node, int(given["WORLD_SIZE"]) // per_node)
    # Set by srun for the tasks of a step. SLURM_NTASKS alone may come from a batch script that starts one process only.
    tasks = int(given.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return _Launched(LightningEnvironment(), 1, 1)
    per_node, nodes = (int(given.get(name, "0")) for name in ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_NODES"))
    if per_node * nodes != tasks:
        raise ConfigError(
            f"srun has started {tasks} tasks on {nodes} node(s), --ntasks-per-node is {per_node or 'not given'}; "
            "give srun --nodes and --ntasks-per-node, and no --ntasks"
        )
    return _Launched(SLURMEnvironment(auto_requeue=False), per_node, nodes)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
