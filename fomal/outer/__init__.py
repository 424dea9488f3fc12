"""Outer rules: from the inner loops of a meta-batch to the outer gradient."""

from fomal.outer.combination import StepCombination
from fomal.outer.fomaml import FOMAML, QueryFOMAML
from fomal.outer.maml import MAML
from fomal.outer.reptile import Reptile
from fomal.outer.rule import OuterRule

__all__ = ["FOMAML", "MAML", "OuterRule", "QueryFOMAML", "Reptile", "StepCombination"]
