from pgharness.analysis.comparison import Comparison as Comparison
from pgharness.analysis.comparison import GroupEstimate as GroupEstimate
from pgharness.analysis.comparison import PairComparison as PairComparison
from pgharness.analysis.comparison import compare as compare
from pgharness.analysis.graders import Agreement as Agreement
from pgharness.analysis.graders import Measure as Measure
from pgharness.analysis.graders import agreement as agreement
from pgharness.analysis.kinds import KINDS as KINDS
from pgharness.analysis.kinds import SELECTING as SELECTING
from pgharness.analysis.kinds import analyse as analyse
from pgharness.analysis.kinds import analyse_scores as analyse_scores
from pgharness.analysis.kinds import library_versions as library_versions
from pgharness.analysis.planning import Detectable as Detectable
from pgharness.analysis.planning import PowerAdvice as PowerAdvice
from pgharness.analysis.planning import power as power
from pgharness.analysis.scores import CaseTable as CaseTable
from pgharness.analysis.scores import Combination as Combination
from pgharness.analysis.scores import Run as Run
from pgharness.analysis.scores import Scores as Scores
from pgharness.analysis.scores import load_scores as load_scores
from pgharness.analysis.trends import Point as Point
from pgharness.analysis.trends import Sweep as Sweep
from pgharness.analysis.trends import Trend as Trend
from pgharness.analysis.trends import sweep as sweep

__all__: list[str]
