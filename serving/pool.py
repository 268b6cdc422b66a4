"""Pool: the served models. The first is there from the start; each other one is loaded with the first request for it."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
    """The served models, each with an engine of its own. Belongs to the event loop; models are loaded in other threads.

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
        self._users = Counter[str]()  # requests that haven't reached the model's engine yet
        self._loading = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return [*self.first.names, *self._others]

    @property
    def services(self) -> list[Service]:
        """The services of the loaded models."""
        return [self.first, *self._loaded.values()]

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

    def device(self, name: str) -> str | None:
        """Where a model runs; None while it isn't loaded."""
        service = self._loaded.get(name) if name in self._others else self.first
        return service.model.runner.device if service else None

    def check(self, name: str | None) -> None:
        """Raises ApiError if there is no model of that name; none and an empty one mean the first."""
        if name and name not in self.names:
            served = ", ".join(map(repr, self.names))
            raise ApiError(404, f"the model {shown(name)} isn't served, only {served}", "model", "model_not_found")

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Service]:
        """Gives the service of a model, which may have to be loaded, and keeps it loaded within the `with` block.

        Raises:
            ApiError: there is no such model, or it can't be loaded now.
        """
        self.check(name)
        if not name or name not in self._others:
            yield self.first
            return
        if name not in self._loaded:
            async with self._loading:  # one at a time; requests to loaded models go on
                if name not in self._loaded:
                    self._loaded[name] = await self._load(name)
        service = self._loaded[name] = self._loaded.pop(name)
        self._users[name] += 1
        try:
            yield service
        finally:
            self._users[name] -= 1

    async def _load(self, name: str) -> Service:
        while True:
            try:
                service = self._serve([name], await asyncio.to_thread(self._others[name].load))
            except Gpt2OnnxError as error:
                if not await self._drop_idle():
                    raise ApiError(503, f"the model {name!r} can't be loaded: {error}") from error
            else:
                service.engine.start()
                if self.first.engine.stopping:
                    service.engine.close()
                _log.info("loaded %s", name)
                return service

    async def _drop_idle(self) -> bool:
        """Drops the loaded model that has been idle for longest; False: there is none."""
        for name, service in self._loaded.items():
            if not self._users[name] and service.engine.idle:
                del self._loaded[name]
                service.engine.close()
                await asyncio.to_thread(service.engine.join, _JOIN_SECONDS)
                _log.info("dropped %s", name)
                return True
        return False
