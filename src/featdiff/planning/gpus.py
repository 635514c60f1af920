"""What a study takes on nodes with GPUs that need not be here: memory of each, traffic, hours and price. All is ours.

Operations and bytes follow from params and from a model's configuration (featdiff.planning.work). Pace and price are stated in
``conf/gpus/<gpu>.yaml``, and nothing here has measured them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from featdiff.config.parse import parse
from featdiff.config.reading import ConfigError, closest, read_yaml
from featdiff.config.values import Params
from featdiff.planning.units import GIB, scaled, sized, timed
from featdiff.planning.work import FLOAT, HALF, Size, Work, one_by_one

FOLDER, GRAPH = Path("conf/gpus"), Path("dvc.yaml")
ALONE = "--one"
"""How a command of the graph says that one process is all that its stage uses."""
Amount = Annotated[float, Field(gt=0)]


class Share(Params):
    """Of the peak, by what is computed (:data:`featdiff.planning.work.Way`)."""

    train: Annotated[float, Field(gt=0, le=1)]
    forward: Annotated[float, Field(gt=0, le=1)]
    sample: Annotated[float, Field(gt=0, le=1)]
    fit: Annotated[float, Field(gt=0, le=1)]


class Gpu(Params):
    """One GPU, as conf/gpus says."""

    memory_gib: Amount
    tflops: Amount
    """Peak of dense products in bfloat16, 10¹² operations a second."""
    tflops_tf32: Amount
    """The same of float32 numbers, as TF32."""
    share: Share
    near_gb: Amount
    """10⁹ bytes a second to other GPUs of its node, and across nodes."""
    far_gb: Amount
    price: Annotated[float, Field(ge=0)]
    """Of an hour, in whatever currency."""

    @classmethod
    def called(cls, name: str) -> Gpu:
        """What conf/gpus says of ``name``. Raises ConfigError where it says nothing."""
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        if name not in known:
            raise ConfigError(f"GPU {name!r}: unknown; {closest(name, known)} ({FOLDER}/*.yaml)")
        return parse(cls, read_yaml(FOLDER / f"{name}.yaml"), str(FOLDER / f"{name}.yaml"))


def alone() -> set[str]:
    """Stages, by the first word of a :class:`Work`'s, that use one process however many GPUs there are: as the graph starts
    them."""
    commands = [str(stage.get("do", stage)["cmd"]) for stage in read_yaml(GRAPH)["stages"].values()]
    return {Path(command.split()[-1]).stem for command in commands if ALONE in command.split()}


class Cluster(NamedTuple):
    """Nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    per_node: int
    alone: set[str]

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.gpu.memory_gib * GIB

    def ranks(self, work: Work) -> int:
        """GPUs that a stage computes on."""
        one = work.stage.split()[0] in self.alone or not work.computes
        return 1 if one else min(self.gpus, work.parts or self.gpus)

    def traffic(self, work: Work, size: Size) -> float:
        """Bytes that each GPU of a stage receives: for every pass over a micro batch, on its way forth and on its way back the
        weights that others hold, and the gradients of those that it holds."""
        ranks = self.ranks(work)
        return work.passes / ranks * (2 * HALF + FLOAT) * size.weights * (ranks - 1) / ranks if work.divided else 0.0

    def seconds(self, work: Work, size: Size) -> float | None:
        """Of a stage, traffic hidden behind computing as far as that reaches; None where little is computed."""
        if not work.way:
            return None
        share, ranks = self.gpu.share, self.ranks(work)
        shared = work.sampled / share.sample + (work.amount - work.sampled - work.repeated) / getattr(share, work.way)
        largest = math.ceil(work.parts / ranks) / work.parts if work.parts else 1 / ranks
        peak = self.gpu.tflops_tf32 if work.single else self.gpu.tflops
        computing = (shared * largest + work.repeated / share.forward) / (peak * 1e12)
        link = self.gpu.near_gb if self.nodes == 1 else self.gpu.far_gb
        return max(computing, self.traffic(work, size) / (link * 1e9))


def lines(works: list[Work], size: Size, cluster: Cluster) -> Iterator[str]:
    """A line per stage, their sums, and what does not fit with the smallest change that would."""
    works = [each.within(cluster.memory) for each in works]
    width, hours = max(len(each.stage) for each in works), 0.0
    yield f"{'stage':{width}}  {'work':>10}  {'disk':>9}  {'GPUs':>4}  {'of each':>9}  {'traffic':>9}  {'time':>8}"
    for each in works:
        took = cluster.seconds(each, size)
        hours += (took or 0.0) / 3600
        ranks, sent = cluster.ranks(each), cluster.traffic(each, size)
        done, held = (scaled(each.amount, "FLOP"), sized(each.on(ranks))) if each.computes else ("", "")
        yield (
            f"{each.stage:{width}}  {done:>10}  {sized(each.disk):>9}  {ranks if held else '':>4}  {held:>9}  "
            f"{sized(sent) if sent else '':>9}  {timed(took) if took is not None else '':>8}"
        )
    gpu, total = cluster.gpu, sum(each.disk for each in works)
    yield f"{'all':{width}}  {'':>10}  {sized(total):>9}  {'':>4}  {'':>9}  {'':>9}  {timed(3600 * hours):>8}"
    paid = hours * cluster.gpus
    yield f"{cluster.gpus} GPUs for {hours:.1f} h: {paid:.0f} GPU hours, {paid * gpu.price:.0f} at {gpu.price:g} an hour."
    yield from one_by_one(works)
    for each in works:
        yield from _misfit(each, cluster)


def _misfit(work: Work, cluster: Cluster) -> Iterator[str]:
    ranks = cluster.ranks(work)
    if not work.computes or work.on(ranks) <= cluster.memory:
        return
    ways = []
    if batch := work.fitting(cluster.memory, ranks):
        ways.append(f"{work.field}: {batch} in place of {work.batch}")
    if work.divided and (fewest := work.fewest(cluster.memory)) > ranks:
        ways.append(f"{fewest} GPUs and {work.field}: 1")
    todo = ", or ".join(ways) or "no batch fits: GPUs with more memory or a smaller model"
    yield f"does not fit: {work.stage} takes {sized(work.on(ranks))} of each GPU, which has {sized(cluster.memory)}; {todo}"
