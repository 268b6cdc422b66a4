"""The model of notebooks and scripts: the runtime's, which generates, with what looks inside it and measures it."""

from .experiments import evaluation, next_token
from .models import inspection
from .models.inspection import Layer
from .runtime import model


class Model(model.Model):
    """A bundle, ready to generate, made by `gpt2onnx.load`. One thread at a time may use it."""

    # The model is these functions' first argument.
    evaluate = evaluation.evaluate
    next_token = next_token.next_token

    def layers(self) -> Layer:
        """The network's layers as a tree, with the shapes of their weights; printed, as `gpt2onnx inspect` shows it."""
        return inspection.layers(self.config)

    def parameters(self) -> int:
        """Number of the network's parameters; a tied output head has none of its own."""
        return self.layers().parameters

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        size = sum(record.size for record in manifest.files.values())
        return (
            f"{manifest.source}: {inspection.summary(self.config)}; {manifest.dtype}, {size / 1e6:,.1f} MB,"
            f" on {self.runner.device} with {self.runner.threads} thread{'s' if self.runner.threads > 1 else ''}"
        )
