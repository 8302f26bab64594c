"""The synchronized mode: the numbers per channel that a batch norm needs, pooled over the ranks of a communicator.

``exchange.py`` is the protocol, ``frames.py`` the data that it sends, and ``mpi.py`` the only file that imports mpi4py,
in the first synchronized call. ``pooling.py`` is the face that the maths sees. ``lost.py`` lets a training go on when a
rank dies, by the calls of MPI in ``ulfm.py``.
"""

from .communicators import check_comm, exchange_over
from .errors import RankLostError, SyncError, SyncTimeoutError
from .exchange import TIMEOUT, Call, Comm, Exchange, as_timeout, begin, settings_text
from .frames import BACKWARD, DOUBLE_BACKWARD, FORWARD, JVP
from .lost import continue_with, step
from .pooling import RankPool
from .replicas import average_gradients, broadcast_state

__all__ = [
    "BACKWARD",
    "DOUBLE_BACKWARD",
    "FORWARD",
    "JVP",
    "TIMEOUT",
    "Call",
    "Comm",
    "Exchange",
    "RankLostError",
    "RankPool",
    "SyncError",
    "SyncTimeoutError",
    "as_timeout",
    "average_gradients",
    "begin",
    "broadcast_state",
    "check_comm",
    "continue_with",
    "exchange_over",
    "settings_text",
    "step",
]
