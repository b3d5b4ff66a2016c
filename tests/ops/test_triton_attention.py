"""The CUDA backend's attention on the CPU (`cuda_attention_cases`)."""

from __future__ import annotations

from interpreter import IS_INTERPRETED, run_interpreted

if not IS_INTERPRETED:

    def test_cases_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from cuda_attention_cases import *  # noqa: F403
    from interpreted_kernels import *  # noqa: F403
