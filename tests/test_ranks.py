"""What ranks tell one another."""

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from speechllm.errors import InputError
from train import ranks


def test_ranks_wait_for_the_first_longer_than_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, new_group = [], distributed.new_group

    def noted_group(**options: Any) -> Any:
        waits.append(options["timeout"])
        return new_group(**options)

    def fail() -> None:
        raise InputError("no room")

    monkeypatch.setattr(distributed, "new_group", noted_group)
    assert ranks.by_first(lambda: 3) == 3
    assert not waits, "there is nobody who waits"
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert ranks.by_first(lambda: "codes") == "codes"
        with pytest.raises(InputError, match="no room"):
            ranks.by_first(fail)
    finally:
        distributed.destroy_process_group()
    assert waits == [ranks.PATIENCE] * 2
    assert ranks.PATIENCE.days >= 1
