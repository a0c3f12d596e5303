"""How a serving container leaves: the endpoint first, then its streams, then the process.

Kubernetes removes a deleted pod from its Service and sends SIGTERM at the same moment, so a pre-stop sleep
keeps the engine open until Envoy has heard. After it the engine drains for the rest of the grace period
(vLLM answers new requests with errors while it drains; without ``--shutdown-timeout``, and after it, open
streams hang until SIGKILL, so the margin after the drain is short). An idle engine leaves within seconds, so
a long grace period costs nothing.

The other pods of a group compute what its leader streams, and are told to go at the same moment: they stay for
as long as the leader's port is open. A leader that crashed has no open port, so its group is rebuilt at once.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAVE_S = 15
# While the leader accepts connections, wait; any failure to connect, or the end of the time, ends the wait.
_FOLLOW = (
    "import os,socket,time\n"
    "end=time.monotonic()+{wait_s}\n"
    "while time.monotonic()<end:\n"
    " socket.create_connection((os.environ['{leader}'],{port}),2).close()\n"
    " time.sleep(1)\n"
)
DRAIN_S = 300
MARGIN_S = 15


@dataclass(frozen=True, slots=True)
class Stopping:
    leave_s: int
    drain_s: int
    grace_s: int

    @property
    def lifecycle(self) -> dict[str, object] | None:
        """A pre-stop hook as an argument list; ``exec`` because the ``sleep`` action needs Kubernetes 1.30."""
        if self.leave_s == 0:
            return None
        return {"preStop": {"exec": {"command": ["sleep", str(self.leave_s)]}}}

    def follow(self, leader_variable: str, port: int) -> dict[str, object]:
        """The pre-stop hook of a pod that works for a leader elsewhere."""
        script = _FOLLOW.format(wait_s=self.leave_s + self.drain_s, leader=leader_variable, port=port)
        return {"preStop": {"exec": {"command": ["python3", "-c", script]}}}


def stopping(grace_s: int | None) -> Stopping:
    """Shares out the user's ``terminationGracePeriodSeconds``, or ours when they gave none."""
    if grace_s is None:
        return Stopping(LEAVE_S, DRAIN_S, LEAVE_S + DRAIN_S + MARGIN_S)
    leave_s = min(LEAVE_S, grace_s // 4)
    margin_s = min(MARGIN_S, grace_s // 4)
    return Stopping(leave_s, grace_s - leave_s - margin_s, grace_s)
