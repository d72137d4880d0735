"""The rollout side with SGLang engines.

Engines may die or hang at any time. Their callers note it and continue without them. They are restarted at points that
all ranks reach together: when new weights are loaded, and during a batch when it cannot continue without them.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from megatron_dsrl.common.collective import broadcast, rank
from megatron_dsrl.common.stop_signals import run_interruptible
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.platform.engine import can_release_engine_memory
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import (
    BatchProgress,
    BatchRequest,
    Feed,
    OnCall,
    OnSamples,
    RolloutBatch,
    WholeFeed,
    ignore,
)
from megatron_dsrl.rollout.custom_generation import custom_generation
from megatron_dsrl.rollout.dispatcher import Dispatcher, GroupJudge
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import connect
from megatron_dsrl.rollout.engines.errors import EnginesLostError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.run_engines import make_engines
from megatron_dsrl.rollout.engines.server_arguments import UNSET_WEIGHT_VERSION, initial_weight_version
from megatron_dsrl.rollout.engines.server_process import ServerProcess
from megatron_dsrl.rollout.growing_response import Decode, Encode
from megatron_dsrl.rollout.open_files import requests_at_a_time
from megatron_dsrl.rollout.rollout import Draw, StepSamples, Value, Watch
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters
from megatron_dsrl.rollout.seeds import sample_seed, seeds_of_batch
from megatron_dsrl.rollout.step_sampling import step_sampling
from megatron_dsrl.rollout.unfinished import CarryOver, UnfinishedGroup, new_groups


class EngineRollout:
    """Samples from SGLang engines, which lend the trainer their memory if the platform supports it. Rank 0 judges."""

    def __init__(
        self,
        config: RolloutSettings,
        run_folder: Path,
        stop_token_ids: tuple[int, ...],
        decode: Decode,
        on_call: OnCall = ignore,
        starting: ServerProcess | None = None,
        encode: Encode | None = None,
        last_step: int | None = None,
    ) -> None:
        """Start the engines. Raises UserError if `rollout.generate` or a verifier does not exist or does not take its
        options.

        Args:
            starting: the process that becomes this rank's server; None starts a new one.
            encode: needed with `rollout.generate`.
            last_step: last step of the run; None: no end.
        """
        self._generation = custom_generation(config.rollout, encode, decode)
        self._config = config
        self._decode = decode
        self._on_call = on_call
        self.training_sampling = SamplingParameters.for_training(config.rollout, stop_token_ids)
        self.weight_version = initial_weight_version(config)
        """Version that new samples carry."""
        self._newest_version = self.weight_version
        """The version that is being loaded, or that has been."""
        self._states = EngineStates()
        """As determined by rank 0."""
        self._recover: Callable[[], None] | None = None
        self._retries = 0
        self._steps = step_sampling(config, self, last_step)
        if rank() == 0:
            requests_at_a_time()  # a limit that is far too low is an error before anything is started
        with ExitStack() as on_failure:
            self._rewards = RewardPool(config.reward, config.data.set_rewards) if rank() == 0 else None
            if self._rewards is not None:
                on_failure.callback(self._rewards.close)
            self._engines = make_engines(config, run_folder, starting)
            on_failure.callback(self._engines.close)
            self._engines.start()
            on_failure.pop_all()

    @property
    def engine_addresses(self) -> list[EngineAddress]:
        """Addresses of the engines that are ready, by engine number."""
        return self._engines.addresses

    def wait_until_ready(self) -> None:
        self._engines.wait_until_ready()

    @property
    def carried(self) -> CarryOver:
        """State that the sampling mode passes from the last step to the next. Rank 0 only."""
        return self._steps.carried

    @carried.setter
    def carried(self, carried: CarryOver) -> None:
        self._steps.carried = carried

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        return self._steps.sample(step, draw, watch)

    def sample_batch(self, feed: Feed, sampling: SamplingParameters, on_samples: OnSamples) -> RolloutBatch:
        assert self._rewards is not None, "only rank 0 samples"
        return self._run(feed, sampling, self._rewards, BatchProgress(on_samples, on_call=self._on_call))

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParameters,
        stream: str,
        *,
        rewards: RewardPool | None = None,
    ) -> list[SampleGroup]:
        """One judged group per prompt, in the order of the prompts; see `Rollout.generate`. Rank 0 only.

        Lost engines are restarted on the way if `while_sampling` runs the call.

        Raises:
            EnginesLostError: engines were lost, and this is not the main thread or not within `while_sampling`.
            EngineError: like `Dispatcher.run`.
        """
        assert self._rewards is not None, "only rank 0 samples"
        seeds = seeds_of_batch(self._config.seed, stream, prompts, samples_per_prompt)
        feed = WholeFeed(new_groups(prompts, seeds))
        progress = BatchProgress(on_call=self._on_call)
        return self._run(feed, sampling, rewards or self._rewards, progress).finished_groups

    def generate_samples(
        self,
        wanted: Sequence[tuple[Prompt, int]],
        sampling: SamplingParameters,
        stream: str,
        on_sample: Callable[[Prompt, int, Sample], None],
        rewards: RewardPool | None = None,
    ) -> None:
        """Draw single samples that do not wait for others of their prompt; the same samples as `generate`. Rank 0 only.

        Args:
            wanted: (prompt, sample number) pairs; those of one prompt should be adjacent, for the engines' caches.
            on_sample: gets every sample, with its prompt and number, as soon as it is judged.
        """
        assert self._rewards is not None, "only rank 0 samples"
        seeds = [sample_seed(self._config.seed, stream, prompt.index, number) for prompt, number in wanted]
        feed = WholeFeed([UnfinishedGroup.new(prompt, [seed]) for (prompt, _), seed in zip(wanted, seeds, strict=True)])

        def hand_over(position: int, group: SampleGroup) -> None:
            on_sample(*wanted[position], *group.samples)

        progress = BatchProgress(on_group=hand_over, on_call=self._on_call)
        self._run(feed, sampling, rewards or self._rewards, progress)

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        if rank() != 0:
            done, from_rank_0 = False, cast(tuple[bool, dict[int, str]], None)
            while not done:
                done, lost = broadcast(from_rank_0)
                self._engines.lose(lost)
                if not done:
                    recover()
            return None
        self._recover = recover
        try:
            result = work()
        finally:
            self._recover = None
        lost = dict(self._states.lost)
        broadcast((True, lost))
        self._engines.lose(lost)  # not called again until they are restarted
        return result

    def recover_engines(self) -> None:
        """Restart lost engines, if there are any, with the weights that they had. Rank 0's main thread, within
        `while_sampling`."""
        lost = dict(self._states.lost)
        if not lost:
            return
        assert self._recover is not None, "only while_sampling can have all ranks restart engines"
        broadcast((False, lost))
        self._engines.lose(lost)
        self._recover()
        self._states.lost.clear()

    def restart_engines(self) -> None:
        """Restart lost engines, with the weights of the model folder. All ranks."""
        self._engines.restart_lost()

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """Like `Rollout.load_weights`; lost engines are restarted first."""
        lost = broadcast(dict(self._states.lost))
        self._engines.lose(lost)
        self._newest_version, self._states.is_loading = version, True
        self._engines.load(make_buckets, version)
        self.weight_version, self._states.is_loading = version, False
        for engine in lost:  # not before: what samples meanwhile must not use an engine without weights
            self._states.lost.pop(engine, None)

    def engine_metrics(self) -> dict[str, int | float]:
        metrics: dict[str, int | float] = {"engine/restarts": self._engines.restarts, "engine/retries": self._retries}
        idle = self._states.use.idle_fraction(len(self.engine_addresses))
        return metrics if idle is None else metrics | {"engine/idle_fraction": idle}

    def release_memory(self) -> None:
        if can_release_engine_memory():
            self._engines.release_memory(["weights", "kv_cache"])

    def resume_weights(self) -> None:
        if can_release_engine_memory():
            self._engines.resume_memory(["weights"])

    def resume_kv_cache(self) -> None:
        if can_release_engine_memory():
            self._engines.resume_memory(["kv_cache"])

    def close(self) -> None:
        """End the engines and the verifier's processes. May be called after a failed start."""
        self._steps.close()
        self._engines.close()
        if self._rewards is not None:
            self._rewards.close()

    def _run(
        self, feed: Feed, sampling: SamplingParameters, rewards: RewardPool, progress: BatchProgress
    ) -> RolloutBatch:
        """Sample a batch to completion, restarting engines as needed."""
        assert self.engine_addresses, "call wait_until_ready() first"
        assert self.weight_version != UNSET_WEIGHT_VERSION, "call load_weights() first: the model folder has none"
        request = BatchRequest(self._config, feed, sampling, self._versions, self._generation)
        batch = RolloutBatch(request, len(self.engine_addresses))
        in_main_thread = threading.current_thread() is threading.main_thread()
        # collective; the main thread may be in another collective
        may_recover = in_main_thread and self._recover is not None
        while True:
            try:
                run_interruptible(self._dispatch(batch, GroupJudge(rewards, self._decode), progress))
                return batch
            except EnginesLostError:
                if not may_recover:
                    raise
                started = time.monotonic()
                self.recover_engines()
                batch.deadline += time.monotonic() - started  # the limit applies to sampling only
            finally:
                self._retries += batch.retries
                batch.retries = 0

    async def _dispatch(self, batch: RolloutBatch, judge: GroupJudge, progress: BatchProgress) -> None:
        async with connect(self.engine_addresses, self._config.engine.update_timeout_seconds) as clients:
            await Dispatcher(batch, clients, self._states, judge, progress).run()

    def _versions(self) -> range:
        return range(self.weight_version, self._newest_version + 1)
