"""The papers' measurements on any model and data, and their pictures.

Lives here: one ablation loop (`measuring`), one loop over training runs (`sweeps`), their rows
(`results`), files and pictures. May import: everything below analysis. To add an analysis of
weights, write its changes and hand them to `measuring.measure`; to show it, add a function to
`pictures`.
"""

from we_surgery._util.progress import Progress as Progress
from we_surgery._util.progress import progress_bar as progress_bar
from we_surgery.analysis.curves import CurveDrawing as CurveDrawing
from we_surgery.analysis.curves import curve_drawing as curve_drawing
from we_surgery.analysis.importance import location_maps as location_maps
from we_surgery.analysis.importance import magnitude_curve as magnitude_curve
from we_surgery.analysis.learning import LearningCurves as LearningCurves
from we_surgery.analysis.learning import Regularized as Regularized
from we_surgery.analysis.learning import learning_curves as learning_curves
from we_surgery.analysis.learning import regularization_variants as regularization_variants
from we_surgery.analysis.measuring import Measuring as Measuring
from we_surgery.analysis.multipliers import multiplier_map as multiplier_map
from we_surgery.analysis.multipliers import multiplier_maps as multiplier_maps
from we_surgery.analysis.multipliers import rank_correlations as rank_correlations
from we_surgery.analysis.pictures import draw as draw
from we_surgery.analysis.removal import apply_masks as apply_masks
from we_surgery.analysis.removal import multiplier_masks as multiplier_masks
from we_surgery.analysis.removal import multiplier_validity as multiplier_validity
from we_surgery.analysis.removal import pruning_curve as pruning_curve
from we_surgery.analysis.results import Ablation as Ablation
from we_surgery.analysis.results import Result as Result
from we_surgery.analysis.saving import save_result as save_result
from we_surgery.analysis.sweeps import Sweep as Sweep
from we_surgery.analysis.sweeps import sweep as sweep
from we_surgery.analysis.variants import epsilon_variants as epsilon_variants
from we_surgery.analysis.variants import initialization_variants as initialization_variants
from we_surgery.analysis.variants import (
    normalization_free_variants as normalization_free_variants,
)
from we_surgery.analysis.variants import reduction_variants as reduction_variants
