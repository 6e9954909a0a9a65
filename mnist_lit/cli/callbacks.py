"""What Hydra calls once it has composed the configuration and before it makes a folder; ``hydra.callbacks`` names it."""

from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback

from mnist_lit.cli import launch


class Prepare(Callback):
    """Lets the command of this process check the configuration, decide on the folder, and finish a sweep."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        if launch.current:
            self._call(launch.current.prepare, config)

    on_multirun_start = on_run_start

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        if launch.current:
            self._call(launch.current.finish, config)

    def _call(self, function: Callable[[Any], None], config: Any) -> None:
        try:
            function(config)
        except Exception as error:
            raise launch.InCallback from error  # Hydra only warns of an Exception
