"""Outer rules: from the inner loops of a meta-batch to the outer gradient."""

from fomal.outer.binomial import BinomialMAML
from fomal.outer.combination import StepCombination
from fomal.outer.fomaml import FOMAML, QueryFOMAML
from fomal.outer.maml import MAML, TruncatedMAML
from fomal.outer.reptile import Reptile
from fomal.outer.rule import Expansion, OuterRule

__all__ = [
    "FOMAML",
    "MAML",
    "BinomialMAML",
    "Expansion",
    "OuterRule",
    "QueryFOMAML",
    "Reptile",
    "StepCombination",
    "TruncatedMAML",
]
