"""Pool: the served models. The first is there from the start; each other one is loaded with the first request for it."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpt2onnx.errors import Gpt2OnnxError

from ..models.bundle import Bundle
from ..models.messages import shown
from ..runtime.model import Model
from .engine import Engine
from .responses import ApiError
from .service import Service

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 5.0  # for the thread of a model that is dropped


@dataclass(frozen=True)
class Unloaded:
    """A model that is loaded on demand."""

    bundle: Bundle
    load: Callable[[], Model]


class Pool:
    """The served models, each with an engine of its own.

    Where memory is short, the model that has been idle for longest makes room for one that is asked for.

    Args:
        first: the service of the first model.
        others: further models, by their names.
        serve: makes the service of a model by its names.
    """

    def __init__(
        self, first: Service, others: Mapping[str, Unloaded], serve: Callable[[Sequence[str], Model], Service]
    ) -> None:
        self.first = first
        self._others, self._serve = others, serve
        self._loaded: dict[str, Service] = {}  # of the others, the last one used at the end
        self._loading = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return [*self.first.names, *self._others]

    @property
    def services(self) -> list[Service]:
        """The services of the loaded models."""
        return [self.first, *list(self._loaded.values())]

    @property
    def engines(self) -> list[Engine]:
        """The engines of the loaded models."""
        return [service.engine for service in self.services]

    def bundle(self, name: str) -> Bundle:
        """A model's bundle.

        Raises:
            ApiError: there is no such model.
        """
        self.check(name)
        return self._others[name].bundle if name in self._others else self.first.model.bundle

    def check(self, name: str | None) -> None:
        """Raises ApiError if there is no model of that name; none and an empty one mean the first."""
        if name and name not in self.names:
            served = ", ".join(map(repr, self.names))
            raise ApiError(404, f"the model {shown(name)} isn't served, only {served}", "model", "model_not_found")

    def service(self, name: str | None) -> Service:
        """The service of a model, which may have to be loaded; not for the event loop's thread.

        Raises:
            ApiError: there is no such model, or it can't be loaded now.
        """
        self.check(name)
        if not name or name not in self._others:
            return self.first
        with self._loading:
            service = self._loaded.pop(name, None) or self._load(name)
            self._loaded[name] = service
        return service

    def _load(self, name: str) -> Service:
        while True:
            try:
                service = self._serve([name], self._others[name].load())
            except Gpt2OnnxError as error:
                if not self._drop_idle():
                    raise ApiError(503, f"the model {name!r} can't be loaded: {error}") from error
            else:
                service.engine.start()
                _log.info("loaded %s", name)
                return service

    def _drop_idle(self) -> bool:
        """Drops the loaded model that has been idle for longest; False: there is none."""
        for name, service in self._loaded.items():
            if not (service.engine.running or service.engine.waiting):
                service.engine.close()
                service.engine.join(_JOIN_SECONDS)
                del self._loaded[name]
                _log.info("dropped %s", name)
                return True
        return False
