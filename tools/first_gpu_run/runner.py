"""Run the stages one after the other, and stop at the first that fails."""

import shutil
from collections.abc import Callable, Sequence

from rich.console import Console

from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.planning.fit import run_memory
from megatron_dsrl.planning.memory import element_bytes
from megatron_dsrl.planning.parameters import parameters_of_model
from tools.first_gpu_run.run_files import RunFiles, write_run
from tools.first_gpu_run.stages import BENCHMARKS_ON_CPU, Stage
from tools.gpu_record.attention_backend import attention_backends, is_log_line
from tools.gpu_record.device_memory import DeviceMemory
from tools.gpu_record.engine_settings import engine_settings
from tools.gpu_record.machine import ROOT, this_gpu
from tools.gpu_record.planned import planned_memory
from tools.gpu_record.processes import Outcome, run_python
from tools.gpu_record.record import Record, Result
from tools.gpu_record.run_figures import speeds

LAST_LINES = 40
"""Lines of a failed stage's output that belong in the record."""


def run_stages(
    stages: Sequence[Stage], record: Record, gpus: int, variables: dict[str, str], console: Console
) -> Result | None:
    """Run the stages, adding each result to the record; returns that of the stage that failed.

    Args:
        stages: in this order.
        record: is saved after every stage; its folder gets a folder for each of them.
        gpus: GPUs of this machine. Stages that need more are skipped.
        variables: environment variables of all stages.
        console: where to.
    """
    for number, stage in enumerate(stages, start=1):
        console.rule(f"stage {number} of {len(stages)}: {stage.name}", align="left")
        if stage.gpus > gpus:
            reason = f"needs {stage.gpus} GPU{'s' if stage.gpus > 1 else ''}, this machine has {gpus}"
            console.print(f"skipped: {reason}")
            record.add(Result(stage.name, stage.proves, "skipped", reason=reason))
            continue
        console.print(f"proves: {stage.proves}; at most {stage.limit_minutes:g} min", highlight=False)
        result = _run_stage(stage, record, variables, lambda line: _show(line, console))
        record.add(result)
        console.print(f"{result.status} after {result.seconds:.0f} s", style="bold")
        if result.status == "failed":
            return result
    return None


def _show(line: str, console: Console) -> None:
    if not is_log_line(line):
        console.print(line, markup=False, highlight=False)


def _run_stage(stage: Stage, record: Record, variables: dict[str, str], show: Callable[[str], None]) -> Result:
    folder = record.folder / stage.name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call, which the run would otherwise resume
    if stage.training is None:
        arguments = _shortened(stage) if record.on_cpu else stage.arguments
        return _result(stage, run_python(arguments, folder / "output.log", stage.limit_minutes * 60, variables, show))
    files = write_run(folder, stage, dry_run=record.on_cpu)
    if (problem := _planned_problem(files)) is not None:
        return Result(stage.name, stage.proves, "skipped", reason=f"does not fit according to `dsrl plan`: {problem}")
    with DeviceMemory() as memory:
        outcome = run_python(files.arguments, folder / "output.log", stage.limit_minutes * 60, variables, show)
    return _result(stage, outcome, files, engine_settings(files.run_folder) | memory.figures)


def _shortened(stage: Stage) -> tuple[str, ...]:
    """A benchmark with arguments for a CPU; other commands as they are."""
    on_cpu = BENCHMARKS_ON_CPU.get(stage.name)
    return stage.arguments if on_cpu is None else (stage.arguments[0], *on_cpu.split())


def _result(
    stage: Stage, outcome: Outcome, files: RunFiles | None = None, watched: dict[str, str] | None = None
) -> Result:
    """The result of a stage, with the figures of its run.

    Args:
        watched: figures from its course, which a failed stage has too.
    """
    figures = dict(watched or {})
    if outcome.problem is None and files is not None:
        try:
            figures = _figures(files, outcome) | figures
        except Exception as error:  # the run went well; what cannot be read must not stop the stages after it
            figures["figures are incomplete"] = f"{type(error).__name__}: {error}"
    lines = LAST_LINES if outcome.problem else stage.shown_lines
    return Result(
        stage.name,
        stage.proves,
        "failed" if outcome.problem else "passed",
        seconds=outcome.seconds,
        reason=outcome.problem,
        figures=figures,
        output=outcome.last_lines(lines) if lines else (),
        command=outcome.command,
    )


def _planned_problem(files: RunFiles) -> str | None:
    """Why a run does not fit these GPUs according to the plan; None if it does, or if the GPU is unknown."""
    gpu = this_gpu()
    if gpu is None:
        return None
    memory = run_memory(_config(files), read_architecture(files.model_folder), gpu.memory_bytes, files.processes)
    return next(iter(memory.problems), None)


def _config(files: RunFiles) -> RunConfig:
    return load_config([ROOT / file for file in files.files], files.overrides)


def _figures(files: RunFiles, outcome: Outcome) -> dict[str, str]:
    """Implementations, speeds, and the planned memory of a run."""
    config, architecture, gpu = _config(files), read_architecture(files.model_folder), this_gpu()
    weight_bytes = parameters_of_model(architecture) * element_bytes(config.model)
    lines = outcome.last_lines(10**6)
    said = next((line for line in lines if line.startswith("trainer: ")), "trainer: unknown")
    return {
        "trainer": said.removeprefix("trainer: "),
        **attention_backends(lines),
        **speeds(files.run_folder, architecture, weight_bytes, gpu, files.processes),
        **planned_memory(config, architecture, gpu, files.processes),
    }
