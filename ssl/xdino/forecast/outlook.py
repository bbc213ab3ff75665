"""A run's hours, memory, disk, network and loader, with every assumption in a sentence.

What a step computes and keeps is counted (`costs`). What it takes is measured on this machine where the
run is to be made here (`rates`), if need be at a smaller batch and scaled by what is counted; else it
follows from the device's figures (`machines`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xdino.forecast import machines
from xdino.forecast.costs import (
    Kept,
    StepCost,
    Workload,
    count_step,
    disk_bytes,
    evaluated_views,
    forward_flops,
    kept,
    memory_bytes,
    network_bytes,
    saves,
)
from xdino.forecast.loading import Loading
from xdino.forecast.machines import Machine
from xdino.forecast.rates import Rates


@dataclass(frozen=True)
class Trial:
    """Steps that were really trained here.

    Args:
        rates: of them. work: with the batch at which they were, which may be smaller.
        import_seconds: from the start of a process to its first line.
    """

    rates: Rates
    work: Workload
    import_seconds: float = 0.0

    @property
    def start_seconds(self) -> float:
        """What came before the first ordinary step: data opened, networks built, kernels compiled."""
        warm = self.work.config.runtime.prefetch + 2  # as `rates.time_steps` does by default
        compiling = self.rates.warm_seconds - warm * self.rates.seconds_per_step
        return self.rates.plan_seconds + max(0.0, compiling)


@dataclass(frozen=True)
class Outlook:
    """What a run will take.

    Args:
        step_seconds: of a step, at the crops of most of the run.
        seconds: of the whole run.
        memory: bytes of one process at the peak; `room`: what there is, 0 where nobody knows.
        disk: bytes by what they are. network: bytes that a process sends in a step.
        loader_cores: of one machine, to feed its processes.
        flops, moved: of a step of one process: operations, and bytes that all else moves.
        assumptions: sentences.
    """

    images: int
    epochs: int
    steps_per_epoch: int
    iterations: int
    total_batch: int
    precision: str
    device: str
    processes: int
    nodes: int
    parameters: int
    step_seconds: float
    seconds: float
    memory: int
    room: int
    disk: Mapping[str, int]
    network: int
    loader_cores: float
    flops: float
    moved: float
    assumptions: Sequence[str]

    @property
    def images_per_second(self) -> float:
        return self.total_batch / self.step_seconds

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def outlook(
    work: Workload,
    machine: Machine,
    nodes: int = 1,
    trial: Trial | None = None,
    loading: Loading | None = None,
) -> Outlook:
    """What `work` will take on `machine`; `trial`: of the same configuration, there."""
    held, step = kept(work), count_step(work)
    sums = _Sums(work, machine, nodes, trial, held, step)
    seconds = sums.step_seconds()
    memory = sums.memory()
    total = sums.total(seconds)
    cores = sums.loader_cores(seconds, loading)
    return Outlook(
        images=work.images,
        epochs=work.config.train.epochs,
        steps_per_epoch=work.steps_per_epoch,
        iterations=work.iterations,
        total_batch=work.total_batch,
        precision=trial.rates.precision if trial is not None else work.precision,
        device=machine.name,
        processes=work.processes,
        nodes=nodes,
        parameters=held.parameters,
        step_seconds=seconds,
        seconds=total,
        memory=memory,
        room=machine.memory,
        disk=disk_bytes(work, held),
        network=network_bytes(work, held),
        loader_cores=cores,
        flops=step.flops,
        moved=step.bytes,
        assumptions=sums.said,
    )


class _Sums:
    """The sums of an outlook, each with what it takes for granted."""

    def __init__(
        self,
        work: Workload,
        machine: Machine,
        nodes: int,
        trial: Trial | None,
        held: Kept,
        step: StepCost,
    ) -> None:
        self.work, self.machine, self.nodes, self.trial = work, machine, nodes, trial
        self.held, self.step = held, step
        self.said: list[str] = []
        small = trial.work.config.train if trial is not None else work.config.train
        self.same_batch = small.batch_size == work.config.train.batch_size
        self.tried = step if trial is None or self.same_batch else count_step(trial.work)

    def step_seconds(self) -> float:
        """Of one step."""
        alone = self.work.processes == 1
        counted = self.machine.seconds(self.step, self.work.precision, alone)
        if self.trial is not None:
            return self._measured(counted)
        machine = self.machine
        if machine.is_cpu:
            self.said.append(
                f"products at {machine.single / 1e9:,.0f} GFLOP/s and memory at "
                f"{machine.bandwidth / 1e9:,.0f} GB/s, measured now; no step was timed"
            )
            return counted
        peak = machine.half if self.work.precision != "fp32" else machine.single
        self.said += [
            f"products reach {machines.PRODUCTS_SHARE:.0%} of {machine.name}'s "
            f"{peak / 1e12:,.0f} TFLOP/s ({self.work.precision}), everything else "
            f"{machines.BANDWIDTH_SHARE:.0%} of its {machine.bandwidth / 1e9:,.0f} GB/s, and each "
            f"operation takes {machines.LAUNCH_SECONDS * 1e6:.1f} us more: as one H100 did, within 19% "
            "in seven shapes, by fused kernels and CUDA graphs",
        ]
        if not alone:
            self.said.append(
                "several processes have no CUDA graphs: Python launches each operation, in "
                f"{machines.WRITING_SECONDS * 1e6:.0f} us as on one host"
            )
        return counted + self._network_wait(counted)

    def _measured(self, counted: float) -> float:
        assert self.trial is not None
        rates = self.trial.rates
        told = (
            f"{rates.steps} steps of {rates.images_per_step} images timed here: "
            f"{rates.seconds_per_step:.3g} s each, within {rates.spread / 2:.0%}, "
            f"{rates.precision}, {rates.cores} threads"
        )
        if rates.wait_share > 0.05:
            told += f", {rates.wait_share:.0%} of it waiting for images"
        self.said.append(told)
        if self.same_batch:
            return rates.seconds_per_step
        small = self.trial.work.config.train.batch_size
        self.said.append(
            f"{small} images a micro-batch instead of {self.work.config.train.batch_size} in these "
            "steps, so that they took seconds: scaled by operations and bytes"
        )
        alone = self.work.processes == 1
        at_small = self.machine.seconds(self.tried, self.work.precision, alone)
        return rates.seconds_per_step * counted / at_small

    def _network_wait(self, seconds: float) -> float:
        """What of the network's time no computing hides."""
        sent = network_bytes(self.work, self.held)
        if not sent:
            return 0.0
        link = machines.NODE_LINK if self.nodes > 1 else machines.GPU_LINK
        self.said.append(
            f"{link / 1e9:.0f} GB/s a GPU {'between' if self.nodes > 1 else 'within'} machines, of "
            f"which {machines.HIDDEN_SHARE:.0%} of a step hides what it can: assumed"
        )
        return max(0.0, sent / link - machines.HIDDEN_SHARE * seconds)

    def memory(self) -> int:
        """Of one process."""
        tensors = memory_bytes(self.work, self.held, self.step)
        if self.trial is not None:
            peak = self.trial.rates.peak_bytes
            if self.same_batch:
                self.said.append("memory: the peak of the process that trained these steps")
                return peak
            more = tensors - memory_bytes(self.trial.work, self.held, self.tried)
            self.said.append(
                "memory: the peak of these steps, and what a larger batch adds, counted"
            )
            gaps = machines.CPU_ALLOCATOR_SHARE if self.machine.is_cpu else machines.ALLOCATOR_SHARE
            return peak + round(gaps * more)
        found = self.machine.needs(tensors, self.work.precision, self.step.peak)
        if self.machine.is_cpu:
            self.said.append(
                f"memory: tensors counted, times {machines.CPU_ALLOCATOR_SHARE} (measured once), and "
                "0.8 GB for the program"
            )
            return found + 800_000_000
        halved = (
            f", half precision {machines.HALF_BYTES:.0%} of float32's activations"
            if self.work.precision != "fp32"
            else ""
        )
        self.said.append(
            f"memory: tensors counted{halved}, {machines.ALLOCATOR_SHARE - 1:.0%} lost to blocks, "
            f"{machines.CONTEXT_BYTES / 2**30:.0f} GiB for CUDA: assumed"
        )
        return found

    def total(self, step_seconds: float) -> float:
        """Of the whole run."""
        work = self.work
        early, seconds = work.early_iterations, work.iterations * step_seconds
        if early and work.early_crops is not None:
            small = self.machine.seconds(count_step(work, early=True), work.precision)
            share = small / self.machine.seconds(self.step, work.precision)
            seconds -= early * step_seconds * (1 - share)
            self.said.append(
                f"the curriculum's {early:,} small steps take {share:.0%} of a large one, as counted"
            )
        if self.trial is not None:
            rates, count = self.trial.rates, saves(work)
            begin = self.trial.import_seconds + self.trial.start_seconds
            seconds += begin + count * rates.state_seconds
            self.said.append(
                f"{begin:.0f} s until the first step, and {count:,} states of "
                f"{rates.state_seconds:.2g} s each"
            )
        return seconds + self._evaluating(step_seconds)

    def _evaluating(self, step_seconds: float) -> float:
        """Of the evaluations while training, by the operations of their forward passes."""
        evaluate, work = self.work.config.evaluate, self.work
        times = work.config.train.epochs // evaluate.every if evaluate.every else 0
        if evaluate.linear:
            self.said.append("the linear probe at the end is not counted")
        if not times:
            return 0.0
        views = evaluated_views(work)
        flops = forward_flops(work, work.spec.input_size) * views
        seconds = flops / self.step.flops * step_seconds
        self.said.append(
            f"{times:,} evaluations, and one before the first step, of about {views:,} images, "
            f"forward passes only: {seconds:.2g} s each"
        )
        return (times + 1) * seconds

    def loader_cores(self, step_seconds: float, loading: Loading | None) -> float:
        """Cores of one machine that keep its processes fed."""
        if loading is None:
            return 0.0
        per_node = self.work.total_batch / self.nodes / step_seconds
        self.said.append(
            f"{loading.seconds * 1e3:.2g} ms to decode and crop an image on one core of this "
            f"machine ({loading.said})"
        )
        return per_node * loading.seconds
