"""The settings of a run's first engine that affect its speed, as SGLang chose them."""

from pathlib import Path

from megatron_dsrl.rollout.engines.server_settings import read_settings


def engine_settings(run_folder: Path) -> dict[str, str]:
    """Figures from what the run recorded; empty if no engine has been ready."""
    settings = read_settings(run_folder / "engines" / "engine_0.log")
    graphs = settings.pop("cuda_graph_config", None) or {}
    return {f"engine, {name}": str(value) for name, value in settings.items()} | {
        f"engine, CUDA graphs, {passes}": f"{each['backend']}, batches up to {each['max_bs']}"
        for passes, each in graphs.items()
    }
