"""How often the scheduler asks for a forward pass."""

from collections.abc import Sequence

import numpy as np
from support.scheduling import VOCABULARY, HashingNetwork

from gpt2onnx.runtime.decoding.start import start
from gpt2onnx.runtime.engine.scheduler import Scheduler
from gpt2onnx.runtime.options import GenerationConfig

CONTEXT = 100


class CountingNetwork(HashingNetwork):
    """After a token t, t + 1 is the likeliest."""

    def logits(self, history: Sequence[int]) -> np.ndarray:
        return 10 * np.eye(VOCABULARY, dtype=np.float32)[(history[-1] + 1) % VOCABULARY]


def decode(
    prompts: list[list[int]], batch_size: int = 1, **options: object
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The passes, and the first continuation of each prompt."""
    network = CountingNetwork()
    config = GenerationConfig(**options)
    searches = [start(np.array(prompt), config, CONTEXT) for prompt in prompts]
    for _ in Scheduler(network).run(searches, batch_size):
        pass
    new = [search.continuations()[0].tokens[len(search.prompt) :].tolist() for search in searches]
    return network.passes, new


def test_no_pass_after_the_end_token() -> None:
    passes, (new,) = decode([[3]], max_new_tokens=50, eos_token_id=8)
    assert new == [4, 5, 6, 7, 8]
    assert passes == [(1, 1)] * 5


def test_no_pass_after_the_context_is_full() -> None:
    passes, (new,) = decode([[1] * CONTEXT], max_new_tokens=5)
    assert (passes, new) == ([(1, CONTEXT)], [2])
    passes, (new,) = decode([[1] * (CONTEXT - 2)], max_new_tokens=5)
    assert (passes, new) == ([(1, CONTEXT - 2), (1, 1), (1, 1)], [2, 3, 4])


def test_a_batch_costs_one_prefill_and_n_minus_1_steps() -> None:
    passes, new = decode([[1], [7, 6, 5]], batch_size=2, max_new_tokens=4)
    assert new == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert passes == [(2, 3)] + [(2, 1)] * 3


def test_prompts_of_unequal_lengths_are_prefilled_alone_and_stepped_together() -> None:
    passes, new = decode([[1], [5] * 20], batch_size=2, max_new_tokens=4)
    assert new == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert passes == [(1, 1), (1, 20)] + [(2, 1)] * 3


def test_a_shared_beginning_is_prefilled_once() -> None:
    passes, new = decode([[1, 2, 9, 4], [1, 2, 9, 6, 7]], max_new_tokens=1)
    assert new == [[5], [8]]
    assert passes == [(1, 4), (1, 2)]


def test_every_row_of_a_batch_ends_by_itself() -> None:
    passes, new = decode([[1], [7], [3]], batch_size=2, max_new_tokens=20, eos_token_id=9)
    assert new == [[2, 3, 4, 5, 6, 7, 8, 9], [8, 9], [4, 5, 6, 7, 8, 9]]
    # The third prompt takes the second one's place after its 2 tokens, and both end 6 tokens later.
    assert passes == [(2, 1)] * 2 + [(1, 1)] + [(2, 1)] * 5 + [(1, 1)]
