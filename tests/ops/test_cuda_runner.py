"""CudaRunner on the CPU, its kernels under Triton's interpreter: whole requests through a session,
against the reference device, and with steps that run ahead against steps that do not.

The cases run in a process of their own: see `interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interpreter import IS_INTERPRETED, run_interpreted

if not IS_INTERPRETED:

    def test_cases_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import numpy as np
    import torch
    from interpreted_kernels import InterpretedKernels

    from puna.builder import plan_checkpoint
    from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
    from puna.cuda.choices import Choices
    from puna.cuda.ops import CudaOps
    from puna.manifest import Manifest
    from puna.memory import rank_memory
    from puna.plan import BuildConfig
    from puna.rank_file import rank_file
    from puna.runtime.block_pool import BlockPool
    from puna.runtime.cuda_runner import CudaRunner
    from puna.runtime.device import Choice
    from puna.runtime.executor import Executor
    from puna.runtime.host_runner import open_host_runner
    from puna.runtime.request import Request, SamplingParams
    from puna.runtime.runner import Opening
    from puna.runtime.scheduler import Scheduler
    from puna.runtime.session import Session

    SHAPE = "hidden=64,layers=2,heads=4,kv_heads=2,ffn=96,vocab=320,max_positions=512"
    LIMITS = {"max_seq_len": 200, "max_batch_size": 4, "max_num_tokens": 48}
    CONFIG = plan_checkpoint(
        DummyCheckpoint(parse_preset(SHAPE), seed=5),
        BuildConfig(dtype="float16", target="sm_90", **LIMITS),
    )

    class Recorded(InterpretedKernels):
        """Kernels whose launches are kept, and made when the program runs: as a graph does it."""

        def __init__(self) -> None:
            super().__init__(CONFIG)
            self.launches: list[tuple[Any, ...]] = []

        def launch(self, *launch: Any) -> None:
            self.launches.append(launch)

        def launch_now(self, launches: list[tuple[Any, ...]]) -> None:
            for launch in launches:
                super().launch(*launch)

    @dataclass(frozen=True)
    class Replay:
        kernels: Recorded
        launches: list[tuple[Any, ...]]

        def run(self) -> None:
            self.kernels.launch_now(self.launches)

    @dataclass(frozen=True)
    class Recorder:
        kernels: Recorded

        def prepare(self, call: Callable[[], None]) -> None:
            call()

        def record(self, emit: Callable[[], None]) -> Replay:
            self.kernels.launches = []
            emit()
            return Replay(self.kernels, self.kernels.launches)

    def opening(device: str) -> Opening:
        return Opening(
            engine_dir=Path("nowhere"),
            manifest=Manifest(()),
            config=CONFIG,
            rank=0,
            layout=rank_file(CONFIG, 0, CONFIG.digest()),
            chosen=Choice(device, layout="rows"),  # type: ignore[arg-type]
            num_blocks=20,
            threads=None,
            num_readers=1,
            report=lambda more: None,
            comm=None,
            deterministic=False,
        )

    def executor_of(session: Session) -> Executor:
        pool = BlockPool(session.num_blocks, session.block_size)
        limits = CONFIG.limits
        scheduler = Scheduler(
            pool, limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len, 320
        )
        return Executor(session, scheduler)

    @pytest.fixture(scope="module")
    def runner() -> CudaRunner:
        """One for all cases: what is recorded is slow to compute, not to keep."""

        def make_ops(arrays: dict[str, Any]) -> CudaOps:
            kernels = Recorded()
            # cuBLAS is not recorded here: every product is a kernel.
            choices = Choices(direct_tokens=1000)
            return CudaOps(CONFIG, 0, kernels, arrays, Recorder(kernels), choices)

        runner = CudaRunner(opening("cuda"), torch.device("cpu"), make_ops)
        runner.load()
        return runner

    @pytest.fixture
    def cuda(runner: CudaRunner) -> Executor:
        return executor_of(Session(opening("cuda"), runner))

    @pytest.fixture(scope="module")
    def reference_session() -> Session:
        return Session(opening("reference"), open_host_runner(opening("reference")))

    @pytest.fixture
    def reference(reference_session: Session) -> Executor:
        executor = executor_of(reference_session)
        executor.reset()  # the session forgets what it ran before
        return executor

    @pytest.fixture(autouse=True)
    def forgets(cuda: Executor) -> None:
        cuda.reset()

    def run(executor: Executor) -> None:
        while not executor.is_idle:
            executor.step()
            executor.scheduler.check()

    def logits(executor: Executor, token_ids: list[int], num_prefill: int) -> np.ndarray:
        executor.add_request(token_ids, want_prompt_logits=True, num_prefill=num_prefill)
        parts = []
        while not executor.is_idle:
            parts += [event.prompt_logits[1] for event in executor.step() if event.prompt_logits]
        return np.concatenate(parts)

    def prompt(seed: int, size: int) -> list[int]:
        return np.random.default_rng(seed).integers(0, 320, size).tolist()

    @pytest.mark.parametrize(
        ("size", "num_prefill"), [(1, 1), (3, 3), (70, 70), (49, 48), (20, 17), (5, 1)]
    )
    def test_logits(cuda: Executor, reference: Executor, size: int, num_prefill: int) -> None:
        """Of more positions than are computed at once, over chunks, and one a step."""
        token_ids = prompt(size, size)
        found = logits(cuda, token_ids, num_prefill)
        expected = logits(reference, token_ids, num_prefill)
        assert found.shape == expected.shape == (size, 320)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 2e-3, error

    def ask(executor: Executor, sampling: list[SamplingParams]) -> list[list[int]]:
        requests: list[Request] = []
        for i, params in enumerate(sampling):
            requests.append(executor.add_request(prompt(i, 3 + 17 * i), params))
            executor.step()
        run(executor)
        return [seq.generated_token_ids for request in requests for seq in request.sequences]

    def greedy(max_new_tokens: int, **more: Any) -> SamplingParams:
        return SamplingParams(max_new_tokens, temperature=0.0, **more)

    PLAIN = (greedy(4), greedy(5, n=2), greedy(2), greedy(1), greedy(4))
    DRAWN = (
        SamplingParams(4, temperature=1.0, seed=3, top_k=40),
        greedy(3),
        SamplingParams(5, temperature=0.7, seed=4, top_p=0.9, min_p=0.01, n=2),
    )
    MIXED = (
        greedy(3),
        greedy(3, repetition_penalty=1.3),
        SamplingParams(3, temperature=1.0, seed=3),
        greedy(3, logprobs=2),
        greedy(3, num_beams=2),
    )

    def test_running_ahead_changes_nothing(cuda: Executor, monkeypatch: Any) -> None:
        ahead = ask(cuda, [*PLAIN, *DRAWN])
        monkeypatch.setattr(cuda.session, "can_run_ahead", lambda params: False)
        cuda.reset()
        assert ask(cuda, [*PLAIN, *DRAWN]) == ahead
        assert [len(tokens) for tokens in ahead] == [4, 5, 5, 2, 1, 4, 4, 3, 5, 5]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_steps_do_run_ahead(cuda: Executor, temperature: float) -> None:
        cuda.add_request(prompt(1, 5), SamplingParams(6, temperature=temperature))
        most = 0
        while not cuda.is_idle:
            cuda.submit()
            most = max(most, len(cuda._in_flight))
            cuda.collect()
        assert most == 2

    def test_what_is_sampled_here_is_sampled_as_on_the_reference(
        cuda: Executor, reference: Executor
    ) -> None:
        """Greedy rows, drawn ones, rows that NumPy samples, and beams, one beside the other. The
        logits of the two differ in the last digits of float16, which changes no token here."""
        assert ask(cuda, list(DRAWN)) == ask(reference, list(DRAWN))
        assert ask(cuda, list(MIXED)) == ask(reference, list(MIXED))
        assert ask(cuda, list(PLAIN)) == ask(reference, list(PLAIN))

    def test_a_forked_block_is_copied(cuda: Executor, reference: Executor) -> None:
        for executor in (cuda, reference):
            executor.pool.prefix_cache = False
        params = [SamplingParams(5, temperature=1.0, seed=1, n=3)]
        assert ask(cuda, params) == ask(reference, params)

    def test_a_step_that_was_broken_off_is_forgotten(cuda: Executor) -> None:
        expected = ask(cuda, [greedy(6)])
        cuda.reset()
        cuda.add_request(prompt(7, 9), greedy(20))
        cuda.step()
        cuda.reset()
        assert ask(cuda, [greedy(6)]) == expected

    def test_memory_is_what_was_planned(runner: CudaRunner) -> None:
        planned, found = rank_memory(CONFIG, 0, "cuda"), runner.memory
        assert found.weights == planned.weights
        assert found.kv_cache == planned.kv_cache // CONFIG.limits.num_blocks * 20
        assert abs(found.workspace - planned.workspace) < 2**16
