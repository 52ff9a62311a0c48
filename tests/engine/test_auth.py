from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pagedserve_engine.errors import AuthenticationError, ConfigError
from pagedserve_engine.server.auth import ApiKeys


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 2.0


def opens(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check(f"Bearer {key}")
    except AuthenticationError:
        return False
    return True


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_a_key_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="it holds no key"):
        ApiKeys(tmp_path / "keys")


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="API_KEY_FILE"):
        ApiKeys(tmp_path / "keys")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic alpha", "alpha", "Bearer beta", "Bearer alpha beta", "Bearer é"]
)
def test_only_bearer_and_a_key_open(tmp_path: Path, header: str) -> None:
    (tmp_path / "keys").write_text("alpha\n")
    keys = ApiKeys(tmp_path / "keys")
    with pytest.raises(AuthenticationError):
        keys.check(header)
    keys.check("bearer  alpha ")


def test_a_changed_file_is_read_again_after_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("alpha\n")
    keys = ApiKeys(path, clock)
    path.write_text("a-longer-key\n")
    assert opens(keys, "alpha")
    clock.tick()
    assert not opens(keys, "alpha")
    assert opens(keys, "a-longer-key")


def test_a_swapped_link_is_noticed(tmp_path: Path) -> None:
    """As the kubelet updates a mounted secret."""
    clock = Clock()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(name)
    (tmp_path / "data").symlink_to(tmp_path / "one")
    keys = ApiKeys(tmp_path / "data" / "keys", clock)
    (tmp_path / "new").symlink_to(tmp_path / "two")
    (tmp_path / "new").rename(tmp_path / "data")
    clock.tick()
    assert opens(keys, "two")
    assert not opens(keys, "one")


def test_a_file_that_breaks_keeps_the_last_keys_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("alpha\n")
    keys = ApiKeys(path, clock)
    path.write_text("")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.tick()
            assert opens(keys, "alpha")
    path.unlink()
    clock.tick()
    assert opens(keys, "alpha")
    assert len(caplog.records) == 1
    path.write_text("beta\n")
    clock.tick()
    assert opens(keys, "beta")
    assert not opens(keys, "alpha")
