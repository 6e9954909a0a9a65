"""The database of a search: Optuna's ``RDBStorage``, but one that waits for a server that has gone away."""

import contextlib
import functools
import inspect
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.exc import InterfaceError, OperationalError

from mnist_lit import UserError
from mnist_lit.storage.tables import one_line

log = logging.getLogger("mnist_lit.tune")

HEARTBEAT_INTERVAL, GRACE_PERIOD = 5, 15  # seconds between heartbeats, and without one until a trial is stale
MAX_RETRIES = 3  # of a trial whose process was killed
DATABASE_TIMEOUT = 300  # seconds to wait for the database
RETRY_INTERVAL = 1.0  # seconds


def without_password(url: str) -> str:
    return re.sub(r"(//[^/:@]*):[^@]*@", r"\1:***@", url)


class RetryingStorage(RDBStorage):
    """``RDBStorage``, each of whose operations is tried again while the database does not answer.

    Attributes:
        timeout: How many seconds an operation waits for the database, at first 0.
        stop: When it is set, nothing waits any more.

    Raises:
        UserError: From an operation that has waited for so long.
    """

    def __init__(self, url: str, *arguments: Any, **options: Any) -> None:
        self.timeout = 0.0
        self.stop = threading.Event()
        self.waiting, self.last_waited = 0, -float("inf")  # how many operations do, and when one did
        self._counting = threading.Lock()
        super().__init__(url, *arguments, **options)

    def with_retries(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except StorageInternalError as error:
            if not (self.timeout and _is_connection_error(error)):
                raise
        with self._counting:
            self.waiting += 1
            if self.waiting == 1:
                log.warning("the database is unreachable; retrying for up to %.0f minutes", self.timeout / 60)
        end = time.monotonic() + self.timeout
        try:
            while True:
                stopped = self.stop.wait(RETRY_INTERVAL)
                try:
                    return operation()
                except StorageInternalError as error:
                    if not _is_connection_error(error):
                        raise
                    if stopped or time.monotonic() > end:
                        where, why = without_password(self.url), one_line(error.__cause__)
                        raise UserError(
                            f"storage={where} is still unreachable ({why}); the same command continues"
                        ) from error
        finally:
            with self._counting:
                self.waiting -= 1
                self.last_waited = time.monotonic()


def _is_connection_error(error: StorageInternalError) -> bool:
    return isinstance(error.__cause__, OperationalError | InterfaceError)


def _retrying(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def retrying(self: RetryingStorage, *arguments: Any, **options: Any) -> Any:
        return self.with_retries(functools.partial(operation, self, *arguments, **options))

    return retrying


for _name, _operation in vars(RDBStorage).items():
    if not inspect.isfunction(_operation) or _name.startswith("__"):
        continue
    if "session" not in inspect.signature(_operation).parameters:  # otherwise it is a part of another operation
        setattr(RetryingStorage, _name, _retrying(_operation))


class Database(RetryingStorage):
    """The database of a search, with heartbeats by which other processes notice that one was killed.

    Args:
        url: SQLAlchemy's, such as ``sqlite:///tune.db``.
    """

    def __init__(self, url: str) -> None:
        super().__init__(
            url,
            {"pool_pre_ping": True},  # replaces connections that a restart of the server has cut
            heartbeat_interval=HEARTBEAT_INTERVAL,
            grace_period=GRACE_PERIOD,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
        )

    @property
    def trusts_heartbeats(self) -> bool:
        """Whether a trial without a heartbeat is stale: not if none could be written shortly before."""
        return not self.waiting and time.monotonic() - self.last_waited > GRACE_PERIOD

    def record_heartbeat(self, trial_id: int) -> None:
        with contextlib.suppress(UserError):  # in a thread of Optuna's, which would print a traceback
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        return super()._get_stale_trial_ids(study_id) if self.trusts_heartbeats else []
