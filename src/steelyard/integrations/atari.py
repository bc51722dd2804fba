"""Atari games as vector environments: grey 84 x 84 frames, four to a step, four stacked.

Needs the extra ``rl``: ``pip install 'steelyard[rl]'``. The games ship with ``ale-py``.
"""

from functools import partial
from typing import Any

from steelyard._checks import check_range
from steelyard._extras import require

gymnasium = require("gymnasium", extra="rl")
_vector = require("gymnasium.vector", extra="rl")
_wrappers = require("gymnasium.wrappers", extra="rl")
ale_py = require("ale_py", extra="rl")
require("cv2", extra="rl")

__all__ = ["make_atari_env"]

FRAME_SKIP = 4
STACK = 4


def make_atari_env(env_id: str, num_envs: int) -> Any:
    """Make copies of an Atari game with the preprocessing of Machado et al. (2018).

    Up to 30 idle steps at the start, frames skipped by four with the maximum of the last two,
    grey, 84 x 84, four stacked; sticky actions as the ``-v5`` games have them. Rewards are the
    game's own.

    Args:
        env_id: for example ``"ALE/Pong-v5"``.
        num_envs: how many copies, >= 1.

    Returns:
        A ``SyncVectorEnv`` with autoreset disabled; observations ``[num_envs, 4, 84, 84]`` bytes.

    Raises:
        ValueError: ``num_envs < 1`` or an unknown game.

    Example:
        >>> envs = make_atari_env("ALE/Pong-v5", 2)
        >>> envs.reset(seed=0)[0].shape
        (2, 4, 84, 84)
        >>> envs.close()

    Source: Machado et al. (2018), Revisiting the Arcade Learning Environment, arXiv:1709.06009.
    """
    check_range("num_envs", num_envs, at_least=1)
    if not env_id.startswith("ALE/"):
        raise ValueError(f"env_id must be a game of ale-py, as ALE/Pong-v5, got {env_id!r}")
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return _vector.SyncVectorEnv(
        [partial(_make, env_id)] * num_envs,
        autoreset_mode=_vector.AutoresetMode.DISABLED,
        copy=False,
    )


def _make(env_id: str) -> Any:
    try:
        env = gymnasium.make(env_id, frameskip=1, disable_env_checker=True)
    except gymnasium.error.Error as error:
        raise ValueError(f"unknown game {env_id!r}: {error}") from error
    env = _wrappers.AtariPreprocessing(env, frame_skip=FRAME_SKIP)
    return _wrappers.FrameStackObservation(env, STACK)
