"""A stream to watch and to steer from a web page, while it goes on."""

from .commands import COMMANDS, parse_command
from .player import Moment, Player, Shown
from .world_camera import WorldCamera

__all__ = ["COMMANDS", "Moment", "Player", "Shown", "WorldCamera", "parse_command"]
