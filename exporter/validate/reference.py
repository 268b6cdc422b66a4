"""The checkpoint in PyTorch, run by transformers: the reference of parity.

Needs the packages torch and transformers, which are imported when a network is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ...models.bundle import CONFIG
from ...runtime.arrays import Logits, Tokens
from ...runtime.decoding.torch_random import Candidates, Generator
from ..checkpoint import in_pytorch
from ..checkpoint.checkpoint import Checkpoint
from ..graph.input_rounding import InputRounding
from .cases import Case

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2LMHeadModel

# Adding some thousand products in another order changes their sum by about this share of its size.
_FLOAT32_NOISE = 1e-6


class Reference:
    """A checkpoint in PyTorch, float32; read by transformers itself where it knows all tensors by their names.

    Attributes:
        name: versions of transformers and torch, and the implementation of attention, for the report.
        version: of transformers.

    Raises:
        MissingExtraError: torch or transformers isn't installed.
        CheckpointError: transformers can't load the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise MissingExtraError("Checking parity with PyTorch", error.name or "torch", "optimum") from error
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version = transformers.__version__
        self.name = f"transformers {self.version} ({in_pytorch.ATTENTION} attention), torch {torch.__version__}"
        self._tied = checkpoint.tied
        try:
            self._model = _load(checkpoint)
        except Exception as error:  # transformers raises errors of any class
            raise CheckpointError(f"transformers can't load {checkpoint.name} to compare with: {error}") from error
        # The cases give all options; the checkpoint's own don't count.
        self._model.generation_config = transformers.GenerationConfig()

    def logits(self, prompts: Sequence[Tokens]) -> list[Logits]:
        """Logits [position, vocabulary] of each prompt."""
        import torch

        with torch.inference_mode():
            return [self._model(torch.from_numpy(prompt[None])).logits[0].numpy() for prompt in prompts]

    def take(self, tensor: Callable[[str], npt.NDArray[np.float32]], *, own_head: bool = False) -> None:
        """Replaces the weights.

        Args:
            tensor: gives each weight by its checkpoint name.
            own_head: untie the output head from the token embedding.
        """
        if own_head and self._tied:
            from torch.nn import Parameter

            self._model.lm_head.weight = Parameter(self._model.lm_head.weight.detach().clone())
            self._tied = False
        in_pytorch.fill(self._model, tensor)

    @contextmanager
    def rounding(self, kinds: Callable[[str], InputRounding | None], *, half: bool) -> Iterator[None]:
        """Lets every linear layer round its input as the kernels of a lower precision do.

        Args:
            kinds: gives the rounding of a layer's input to 8 bits, by the weight's name; None for no rounding.
            half: round inputs and outputs to float16.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        generator = torch.Generator().manual_seed(0)

        def rounded(name: str) -> Callable[[Any, tuple["Tensor"]], tuple["Tensor"]]:
            kind = kinds(name)

            def hook(_: Any, inputs: tuple["Tensor"]) -> tuple["Tensor"]:
                (x,) = inputs
                noise = _FLOAT32_NOISE * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
                if half:
                    x = x.half().float()
                if kind is not None:
                    x = torch.from_numpy(kind.rounded(x.numpy()))
                return (x + noise,)

            return hook

        def halved(_: Any, inputs: tuple["Tensor"], output: "Tensor") -> "Tensor":
            return output.half().float()

        with ExitStack() as hooks:
            for name, module in self._model.named_modules():
                if isinstance(module, Conv1D | torch.nn.Linear):
                    hook = rounded(name.removeprefix("transformer.") + ".weight")
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
                    if half:
                        hooks.callback(module.register_forward_hook(halved).remove)
            yield

    def tokens(self, case: Case) -> list[list[int]]:
        """The tokens that `transformers.generate` adds to the prompt, of each returned sequence, up to its end token."""
        import torch

        options = dict(case.options)
        seed = options.pop("seed", None)
        ends = options.get("eos_token_id", [])
        ends = [ends] if isinstance(ends, int) else list(ends)
        prompt = torch.tensor([case.prompt_ids])
        if seed is not None:
            torch.manual_seed(seed)
        # Padding behind an end token goes through the network, so it has to be a token.
        options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": ends[0] if ends else 0}
        model: Any = self._model  # its type has no generate
        with torch.inference_mode():
            output = model.generate(prompt, **options)
        sequences = []
        for row in output[:, prompt.shape[1] :].tolist():
            length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
            sequences.append(row[:length])
        return sequences


def _load(checkpoint: Checkpoint) -> "GPT2LMHeadModel":
    import torch
    from transformers import GPT2Config as Settings
    from transformers import GPT2LMHeadModel

    attention: dict[str, Any] = {"attn_implementation": in_pytorch.ATTENTION}
    weights = [*checkpoint.folder.glob("model*.safetensors"), *checkpoint.folder.glob("pytorch_model*.bin")]
    own_layout = (checkpoint.folder / CONFIG).is_file() and weights and not Path(checkpoint.name).is_file()
    if own_layout and checkpoint.adapter is None:
        config = Settings.from_dict(dict(checkpoint.raw_config))
        model, report = GPT2LMHeadModel.from_pretrained(
            checkpoint.folder, config=config, dtype=torch.float32, output_loading_info=True, **attention
        )
        if not report["missing_keys"]:
            return model.eval()
        # Missing weights would be random: the tensors have names of another layout.
    return in_pytorch.build(checkpoint)


def same_random_numbers() -> bool:
    """Whether this PyTorch's CPU generator draws the numbers that `runtime.decoding.torch_random` reproduces."""
    import torch

    logits = np.zeros(1000, np.float32)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        theirs = [int(torch.multinomial(torch.softmax(torch.from_numpy(logits), -1), 1)) for _ in range(8)]
    finally:
        torch.random.set_rng_state(state)
    generator = Generator(0)
    return theirs == [int(generator.multinomial(Candidates.all(logits))[0]) for _ in range(8)]
