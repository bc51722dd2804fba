"""The systems of the library: what each is, where it lives, whether it can be run yet.

Pure data: nothing here imports a method or PyTorch, so that ``steelyard list`` answers at once.
The status is read from the source tree, never written by hand.
"""

import ast
import difflib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

Status = Literal["recipe ready", "method ready, experiment to come", "planned"]
FORMS = ("quick", "full")
STATUSES: tuple[Status, ...] = ("recipe ready", "method ready, experiment to come", "planned")

OTHER_RECIPES = {"gbpo": "bpo"}
"""Further recipes, and the system that each belongs to."""

_SOURCE = Path(__file__).parents[1]


@dataclass(frozen=True)
class System:
    """One published method of the library.

    Attributes:
        name: its name on the command line.
        number: its place in the catalogue, from 1.
        title: title of the paper.
        arxiv: arXiv identifier.
        package: the package of :mod:`steelyard` that holds it.
        names: the public names that make it up, those it shares with no other system.
        purpose: what it is for, in one sentence.
    """

    name: str
    number: int
    title: str
    arxiv: str
    package: str
    names: tuple[str, ...]
    purpose: str

    @property
    def module(self) -> str:
        """Name of its recipe's module inside :mod:`steelyard.recipes`."""
        return self.name.replace("-", "_")


def find(name: str) -> System:
    """Return the system called ``name``, or the one of which ``name`` is another recipe.

    Raises:
        ValueError: no such system; suggests the nearest name.

    Example:
        >>> find("bpo").package
        'policy'
        >>> find("ponitta")
        Traceback (most recent call last):
        ...
        ValueError: no system is called 'ponitta'; did you mean 'ponita'? ...
    """
    for system in SYSTEMS:
        if system.name == name:
            return system
    if name in OTHER_RECIPES:
        return replace(find(OTHER_RECIPES[name]), name=name)
    near = difflib.get_close_matches(name.lower(), names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"no system is called {name!r}{hint} `steelyard list` shows all of them")


def names() -> list[str]:
    """Return every name that :func:`find` knows."""
    return [*(system.name for system in SYSTEMS), *OTHER_RECIPES]


def status(system: System, *, source: Path = _SOURCE) -> Status:
    """Tell how far a system is built, from the files under ``source`` (the package's folder)."""
    if (source / "recipes" / f"{system.module}.py").is_file():
        return "recipe ready"
    if set(system.names) <= _exported(source / system.package / "__init__.py"):
        return "method ready, experiment to come"
    return "planned"


@cache
def _exported(init: Path) -> frozenset[str]:
    """Read the names in ``__all__`` of a package without importing it."""
    if not init.is_file():
        return frozenset()
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return frozenset(
                item.value
                for item in ast.walk(node)
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )
    return frozenset()


def _number(*systems: tuple[str, str, str, str, str, str]) -> tuple[System, ...]:
    return tuple(
        System(name, number, title, arxiv, package, tuple(names.split()), purpose)
        for number, (name, title, arxiv, package, names, purpose) in enumerate(systems, start=1)
    )


SYSTEMS: tuple[System, ...] = _number(
    (
        "bpo",
        "Bounded Ratio Reinforcement Learning",
        "2604.18578",
        "policy",
        "bpo_loss bpo_target_ratio bpo_threshold_loss bounded_ratio_optimum tabular_improvement "
        "gbpo_signals gbpo_loss",
        "Policy optimisation that fits the exact best policy inside a band around the old one, "
        "and pulls ratios back where PPO's clip has no gradient.",
    ),
    (
        "token-shift",
        "Sparse but Critical: A Token-Level Analysis of Distributional Shifts in RLVR "
        "Fine-Tuning of LLMs",
        "2603.22446",
        "tokens",
        "token_shift nucleus shift_summary cross_sample exact_cross_sampling",
        "Shows at which tokens a fine-tuned language model departs from its base, and whether "
        "just those tokens carry the gain.",
    ),
    (
        "awm",
        "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        "2509.25050",
        "diffusion",
        "flow_grpo_step ddpo_step flow_grpo_kl awm_log_likelihood awm_loss prompt_advantages "
        "clip_advantages",
        "Fine-tunes a diffusion or flow model on a black-box reward with its own pretraining "
        "loss, weighted by the advantage of each finished sample.",
    ),
    (
        "scorecard",
        "An Information-Theoretic Framework for Credit Risk Modeling: Unifying Industry Practice "
        "with Statistical Theory for Fair and Interpretable Scorecards",
        "2509.09855",
        "tabular",
        "WoEBinner Scorecard woe_table iv_inference psi psi_test fairness_probability pareto_front",
        "Credit scorecards whose weights of evidence, information values and stability indices "
        "come with standard errors, tests and a frontier against fairness.",
    ),
    (
        "doubly-robust",
        "Doubly Robust Instance-Reweighted Adversarial Training",
        "2308.00311",
        "classification",
        "kl_dro_weights kl_dro_value ScgdTracker pgd_attack log_barrier_attack doubly_robust_step",
        "Adversarial training that also lets the adversary choose which items count, for better "
        "robustness of the weakest class.",
    ),
    (
        "f-dpg",
        "Aligning Language Models with Preferences through f-divergence Minimization",
        "2302.08215",
        "preference",
        "dpg_loss LogPartition fit_distributional_constraints rlhf_log_target",
        "Moves a policy towards a target distribution under any f-divergence, to trade "
        "satisfying the preference against keeping diversity.",
    ),
    (
        "f-distill",
        "One-step Diffusion Models with f-Divergence Distribution Matching",
        "2502.15681",
        "diffusion",
        "f_distill_weight RatioNormalizer dmd_loss fake_score_loss discriminator_loss "
        "generator_loss",
        "Distils a many-step diffusion teacher into a one-step generator under a divergence "
        "that can keep all modes.",
    ),
    (
        "fair-dcov",
        "Machine Learning with Multitype Protected Attributes: Intersectional Fairness through "
        "Regularisation",
        "2509.08163",
        "tabular",
        "DistanceCovarianceRegularizer FairRegressor FairClassifier group_js calibrate_strength "
        "unfairness",
        "Trains predictors that do not depend on several protected attributes together, of any "
        "type, without listing the groups.",
    ),
    (
        "f-dpo",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
        "Constraints",
        "2309.16240",
        "preference",
        "f_dpo_loss regularised_optimum",
        "Direct preference optimisation with the leash to the reference model measured by "
        "another f-divergence, for more diverse answers.",
    ),
    (
        "pld",
        "PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        "2506.12542",
        "distillation",
        "pld_loss plackett_luce_loss",
        "Distils a classifier by having the student reproduce the teacher's ranking of the "
        "classes, the true label first, with no mixing weight to tune.",
    ),
    (
        "sparse-po",
        "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
        "2410.05102",
        "preference",
        "sparse_po_loss activation_mask LearnedTokenMask",
        "Preference optimisation in which a mask, computed or learned, decides which tokens "
        "count for the reward and which for the leash.",
    ),
    (
        "rerank",
        "Supervised Fine-Tuning or Contrastive Learning? Towards Better Multimodal LLM Reranking",
        "2510.14824",
        "metric_learning",
        "contrastive_rerank_loss sft_rerank_loss rerank_weights unified_rerank_loss ndcg",
        "Trains rerankers with the weight and the direction of the gradient chosen apart, and "
        "shows which of the two makes the difference.",
    ),
    (
        "information-projection",
        "MLE convergence speed to information projection of exponential family: Criterion for "
        "model dimension and sample size",
        "2105.08947",
        "estimation",
        "ExponentialFamily information_projection risk_expansion tic_penalty bayes_error_risk "
        "minimum_sample_size pn_criterion",
        "Answers whether a sample is large enough for a model with that many parameters, even "
        "if the model is wrong.",
    ),
    (
        "anyloss",
        "AnyLoss: Transforming Classification Metrics into Loss Functions",
        "2405.14745",
        "classification",
        "soft_confusion anyloss anyloss_with_logits f_beta",
        "Trains a binary classifier directly for F-beta, balanced accuracy or any other metric "
        "of the confusion matrix, for imbalanced data.",
    ),
    (
        "adora",
        "ADORA: Training Reasoning Models with Dynamic Advantage Estimation on Reinforcement "
        "Learning",
        "2602.10019",
        "policy",
        "adora_weights",
        "Weighs each prompt's advantages by how useful its fresh answers show it to be, in "
        "group-relative training of reasoning models.",
    ),
    (
        "universality",
        "The universality lens: why even highly over-parametrized models learn well",
        "2506.07661",
        "estimation",
        "BayesianMixture online_regret batch_regret soft_bound ball_bound hypothesis_weight SGLD",
        "Explains and bounds how well a huge model class generalises by the prior weight of the "
        "models near the truth.",
    ),
    (
        "cs-ib",
        "Cauchy-Schwarz divergence information bottleneck for regression",
        "2404.17951",
        "estimation",
        "CauchySchwarzBottleneck cs_ib_loss",
        "Regression that keeps of its input only what predicts the target, with kernel "
        "estimates in place of variational bounds.",
    ),
    (
        "presto",
        "Predicting Rare Events by Shrinking Towards Proportional Odds",
        "2305.18700",
        "classification",
        "PrestoClassifier proportional_odds_nll presto_penalty presto_path lambda_max",
        "Estimates the probability of a rare last outcome by borrowing strength from the "
        "common steps before it.",
    ),
    (
        "causal-bounds",
        "Information-Theoretic Causal Bounds under Unmeasured Confounding",
        "2601.17160",
        "causal",
        "divergence_radius radius_derivative finite_support_bounds manski_bounds CausalBounds "
        "debiased_risk aggregate_bounds",
        "Bounds a causal effect under hidden confounding from the propensity alone, with no "
        "instrument and no sensitivity parameter.",
    ),
    (
        "canon",
        "Conditional Advantage Estimation for Reinforcement Learning in Large Reasoning Models",
        "2509.23962",
        "policy",
        "canon_split canon_advantages canon_mu_schedule mean_token_entropy",
        "Lets group-relative training find out whether longer or more uncertain answers are "
        "better, in place of a penalty with a sign chosen by hand.",
    ),
    (
        "sinkd",
        "Sinkhorn Distance Minimization for Knowledge Distillation",
        "2402.17110",
        "distillation",
        "sinkhorn_kd_loss",
        "Distils with the cost of transporting a batch of student outputs onto the teacher's, "
        "which sees how far apart distributions are.",
    ),
    (
        "amcl",
        "Adaptive Multi-head Contrastive Learning",
        "2310.05615",
        "metric_learning",
        "simclr_loss moco_loss simsiam_loss barlow_twins_loss PairTemperature "
        "adaptive_temperature_loss MultiHeadContrastive",
        "Self-supervised learning with several projection heads and a temperature for each "
        "pair, for strong augmentations.",
    ),
    (
        "info-gain",
        "Improving Sampling for Masked Diffusion Models via Information Gain",
        "2602.18176",
        "diffusion",
        "position_entropies information_gain_scores transfer_schedule decode_masked masked_nelbo "
        "TabularMaskedModel",
        "Decodes masked diffusion models in the order that tells most about what is still "
        "masked, without training.",
    ),
    (
        "dpp-least-squares",
        "Weighted least squares with determinantal point processes and generalized volume sampling",
        "2312.14057",
        "estimation",
        "orthonormal_basis christoffel sample_optimal_iid sample_projection_dpp sample_volume "
        "weighted_least_squares WeightedLeastSquares",
        "Chooses where to evaluate an expensive function so that a least-squares fit of few "
        "points is stable and nearly optimal.",
    ),
    (
        "inductive-bias",
        "Towards exact computation of inductive bias",
        "2406.15941",
        "estimation",
        "inductive_bias empirical_inductive_bias scaled_ncx2_fit kernel_hypothesis_space "
        "error_moments exact_inductive_bias",
        "Counts, in nats, the information a task asks for beyond its training data, to compare "
        "tasks and architectures.",
    ),
    (
        "ponita",
        "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in "
        "Position-Orientation Space",
        "2310.02970",
        "equivariant",
        "Ponita invariant_attributes separable_convolution orientation_grid ChargedParticles",
        "A network for point clouds and molecules that turns with its input, built from plain "
        "linear layers on a grid of directions.",
    ),
    (
        "divergen",
        "DiverGen: Improving Instance Segmentation by Learning Wider Data Distribution with More "
        "Diverse Generative Data",
        "2405.10185",
        "vision",
        "free_energy inter_similarity paste_instance repeat_factors mask_average_precision",
        "Filters generated objects, pastes them into training images and measures whether they "
        "widen what an instance segmenter learns.",
    ),
    (
        "ldr",
        "Label Distributionally Robust Losses for Multi-class Classification: Consistency, "
        "Robustness and Adaptivity",
        "2112.14869",
        "classification",
        "ldr_loss ldr_weights aldr_loss aldr_temperature normalize_logits ALDRState",
        "A replacement for cross-entropy under noisy labels, with one temperature between the "
        "sharp and the tolerant end, fixed or set per item.",
    ),
    (
        "fedau",
        "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging",
        "2306.03401",
        "federated",
        "ParticipationWeights aggregate interval_moments",
        "Federated averaging that corrects for clients taking part at different unknown rates, "
        "from the gaps between their visits.",
    ),
    (
        "paretoflow",
        "ParetoFlow: Guided Flows in Multi-Objective Optimization",
        "2412.03718",
        "diffusion",
        "simplex_lattice weight_neighbours guided_velocity cone_select hypervolume "
        "non_dominated_sort",
        "Proposes designs along the Pareto front of several objectives from a table of past "
        "designs, without new evaluations.",
    ),
    (
        "adamp",
        "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        "2006.08217",
        "optim",
        "AdamP SGDP tangent_project scale_invariance_score",
        "Drop-in replacements for Adam and SGD that keep weights before a normalisation layer "
        "from growing and so from slowing down.",
    ),
    (
        "ranking-accuracy",
        "Preference Learning Algorithms Do Not Learn Preference Rankings",
        "2405.19534",
        "preference",
        "ranking_accuracy idealized_log_ratio idealized_ranking_accuracy dpo_flip_threshold "
        "dpo_gamma_loss",
        "Measures whether a tuned model really ranks the preferred answer first, and the best "
        "that its reference model would let it reach.",
    ),
    (
        "equilibrium-propagation",
        "Improving equilibrium propagation without weight symmetry through Jacobian homeostasis",
        "2309.02214",
        "equilibrium",
        "fixed_point error_vector homeostatic_loss symmetry_measure EquilibriumNetwork",
        "Trains a recurrent network by how its resting state moves, without back-propagation "
        "and without symmetric weights.",
    ),
    (
        "tcm",
        "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
        "2307.04047",
        "metric_learning",
        "tcm_loss operating_point_utility opis",
        "Makes one distance threshold fit all classes of a retrieval system, and measures how "
        "well it does.",
    ),
    (
        "adpa",
        "Advantage-Guided Distillation for Preference Alignment in Small Language Models",
        "2502.17927",
        "distillation",
        "dckd_loss teacher_advantage adpa_term adpa_loss",
        "Aligns a small language model with the token-level advantages of a large aligned "
        "teacher over its unaligned self.",
    ),
)
