"""What holds a pod up, in words that stay while it does."""

from __future__ import annotations

import pytest

from controller.reconcile.desired.stuck import stuck


def pod(reason: str, message: str):
    waiting = {"reason": reason, "message": message}
    return {"status": {"containerStatuses": [{"name": "engine", "state": {"waiting": waiting}}]}}


@pytest.mark.parametrize("reason", ["ErrImagePull", "SignatureValidationFailed", "RegistryUnavailable"])
def test_an_image_that_cannot_be_pulled_is_told_alike_in_an_attempt_and_after_it(reason: str):
    cause = "rpc error: code = NotFound desc = no such tag"
    attempt = pod(reason, cause)
    between = pod("ImagePullBackOff", f'Back-off pulling image "vllm/none:v1": {reason}: {cause}')
    assert stuck(attempt) == stuck(between) == f"{reason}: {cause}"


def test_an_older_kubelet_names_the_image_alone():
    told = 'Back-off pulling image "vllm/none:v1"'
    assert stuck(pod("ImagePullBackOff", told)) == f"ImagePullBackOff: {told}"


def test_a_container_that_is_being_made_is_not_held_up():
    assert stuck(pod("ContainerCreating", "")) == ""
