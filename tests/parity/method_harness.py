"""Drives a registered method as the training loop does, on given logits, beside the step of its authors.

A reference is written from the paper or from facts of the authors' code, in plain numpy or torch, and imports nothing
of the package. ``AUTHORS`` names, for each method, where the reference comes from and how close the two must be.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisysam import methods

CPU = torch.device("cpu")
SAMPLES, CLASSES = 24, 5

# method -> (where the reference comes from, relative tolerance of losses, gradients and state)
AUTHORS: dict[str, tuple[str, float]] = {
    "ce": ("torch cross_entropy", 1e-12),
    "gce": ("HanxunH/Active-Passive-Losses@04bce53 loss.py GeneralizedCrossEntropy", 1e-12),
    "gce-truncated": ("AlanChou/Truncated-Loss@fef5908 TruncatedLoss.py, main.py", 1e-12),
    "label-smoothing": ("UCSC-REAL/negative-label-smoothing-in-noisy-labels@05078f6 README.md", 1e-6),
    "reed-soft": ("giorgiop/loss-correction@15a79de loss.py boot_soft", 1e-7),
    "reed-hard": ("giorgiop/loss-correction@15a79de loss.py boot_hard", 1e-7),
    "mae": ("HanxunH/Active-Passive-Losses@04bce53 loss.py MeanAbsoluteError, twice", 1e-12),
    "sce": ("HanxunH/SCELoss-Reproduce@c81fb33 loss.py", 1e-7),
    "nce-rce": ("HanxunH/Active-Passive-Losses@04bce53 loss.py NCEandRCE", 1e-7),
    "gjs": ("ErikEnglesson/GJS@1a3c9e0 losses.py JensenShannonDivergenceWeightedScaled", 1e-7),
    "forward": ("giorgiop/loss-correction@15a79de loss.py, models.py", 1e-6),
    "backward": ("giorgiop/loss-correction@15a79de loss.py, models.py", 1e-6),
    "mixup": ("facebookresearch/mixup-cifar10@eaff31a train.py", 1e-6),
    "bootstrap": ("arXiv 2010.01412 section 3.3", 0.0),
    "nts": ("chenpf1025/RobustnessAccuracy@238732e train_cifar10_ce.py", 0.0),
    "elr": ("shengliu66/ELR@934af53 ELR/model/loss.py", 1e-6),
    "elr+": ("shengliu66/ELR@934af53 ELR_plus/trainer/trainer.py, model/loss.py", 1e-6),
    "selc": ("MacLLL/SELC@69bcf1e class-conditional_noise/train_cifar_with_SELC.py", 1e-6),
    "sop+": ("shengliu66/SOP@4d991ce model/loss.py, data_loader/data_loaders.py", 1e-6),
    "peer": ("weijiaheng/Multi-class-Peer-Loss-functions@fba9eb6 CIFAR-10/runner.py, CIFAR-100/runner.py", 1e-6),
    "f-divergence": ("weijiaheng/Robust-f-divergence-measures@93d9efe CIFAR-10/runner.py", 1e-6),
    "cores2": ("UCSC-REAL/cores@cf0945e loss.py, phase1.py", 1e-6),
    "cores2-consistency": ("UCSC-REAL/cores@cf0945e phase2/phase2.py, phase2/data.py", 1e-6),
    "cal": ("UCSC-REAL/CAL@bdb376b lossfuncs/peerloss.py, experiments/exptPeerReg.py", 1e-6),
    "volminnet": (
        "xuefeng-li1/Provably-end-to-end-label-noise-learning-without-anchor-points@06e4167 main.py, models.py",
        1e-6,
    ),
    "t-revision": ("xiaoboxia/T-Revision@b598cf2 main.py, loss.py, tools.py", 1e-6),
    "pes-semi": ("tmllab/2021_NeurIPS_PES@ec5290d PES_semi.py", 1e-6),
    "promix": ("Justherozen/ProMix@40d8378 Train_promix.py, utils/utils.py, utils/fmix.py", 1e-5),
    "disc": ("JackYFL/DISC@a21e910 algorithms/DISC.py, losses/loss_mixup.py", 1e-6),
    "sop": ("shengliu66/SOP@4d991ce model/loss.py, train.py", 1e-6),
    "pes": ("tmllab/2021_NeurIPS_PES@ec5290d PES_cs.py, common/tools.py", 1e-6),
    "joint-optimization": ("DaikiTanaka-UT/JointOptimization@7e7a30d first_step_train.py, second_step_train.py", 1e-6),
    "pencil": ("yikun2019/PENCIL@8a89ed5 PENCIL.py", 1e-6),
    "nlnl": (
        "ydkim1293/NLNL-Negative-Learning-for-Noisy-Labels@921dec4 main_NL.py, main_PL.py, main_pseudo1.py,"
        " main_pseudo2.py",
        1e-6,
    ),
    "adacorr": ("pingqingsheng/LRT@ba1ede6 LRTcorrect.py", 1e-6),
    "plc": ("pxiangwu/PLC@8c2bcfd cifar/train.py, utils.py", 1e-6),
    "co-learning": (
        "chengtan9907/Co-learning@9d709ed algorithms/Colearning.py, losses/loss_ntxent.py, losses/loss_structrue.py",
        1e-5,
    ),
    "jo-src": ("NUST-Machine-Intelligence-Laboratory/Jo-SRC@e5c8bd9 cifar100.py", 1e-6),
    "augdesc": ("KentoNishi/Augmentation-for-LNL@908a22b train_cifar.py, dataloader_cifar.py", 1e-5),
    "longremix": (
        "filipe-research/LongReMix@567c89b Train_cifar_longremix_stage1.py, Train_cifar_longremix_stage2.py",
        0.0,
    ),
    "pgdf": ("bupt-ai-cz/PGDF@f7b6de7 train_cifar_getPrior.py, train_cifar.py, dataloader_easy.py", 1e-5),
    "unicon": (
        "nazmul-karim170/UNICON-Noisy-Label@616dc49 Train_cifar.py, dataloader_cifar.py, Contrastive_loss.py",
        1e-5,
    ),
    "co-teaching": ("bhanML/Co-teaching@7c7fbe2 loss.py, main.py", 1e-6),
    "co-teaching+": ("arXiv 1901.04215 Algorithm 1; xingruiyu/coteaching_plus@a68ed61 loss.py, main.py", 1e-6),
    "jocor": ("hongxin001/JoCoR@86db359 algorithm/loss.py, algorithm/jocor.py", 1e-6),
    "decoupling": ("emalach/UpdateByDisagreement@86d01a8 train.py", 1e-6),
    "dividemix": ("LiJunnan1992/DivideMix@d9d3058 Train_cifar.py", 1e-5),
    "m-dyr-h": ("PaulAlbert31/LabelNoiseCorrection@5e9a73e utils.py", 1e-5),
    "ssr": ("MrChenFeng/SSR_BMVC2022@849530d main_cifar.py, utils/funcs.py, utils/classbalancedsampler.py", 1e-6),
    "cdr": ("xiaoboxia/CDR@6665a8b main.py train_one_step", 1e-12),
    "mentornet": ("google-research/google-research@0c1bbe5 mentormix/code/utils.py loss_thresholding_function", 1e-6),
    "mentormix": ("google-research/google-research@0c1bbe5 mentormix/code/utils.py mentor_mix_up", 1e-6),
    "rog": ("pokaxpoka/RoGNoisyLabel@0cf223f generative_utils.py, inference.py", 1e-5),
    "o2u": ("hjimce/O2U-Net@ef89d99 main.py", 1e-5),
    "incv": ("chenpf1025/noisy_label_understanding_utilizing@a6c8e0d INCV_main.py", 0.0),
}


def begin(
    name: str, labels: Tensor | None = None, *, epochs: int = 10, seed: int = 0, facts: Any = None, **options: Any
) -> Any:
    """A method at the start of a training on these labels; ``facts``: of the run and its noise."""
    labels = some_labels() if labels is None else labels
    told = methods.RunInfo(samples=len(labels), classes=CLASSES, epochs=epochs, device=CPU, **(facts or {}))
    method = methods.compose(name)(methods.options(name, options), told)
    redraw(method, seed)
    method.on_stage(labels)
    return method


def stages(method: Any, predict: Callable[[str], Tensor]) -> Any:
    """The trainings of a method; ``predict``: what it may ask of the training that just ended."""
    return method.stages(methods.StageContext(predict))


def redraw(method: Any, seed: int) -> None:
    """Give a method the draws of this seed."""
    method.generator, method.rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)


def epoch(method: Any, number: int, predictions: Any = None, features: Any = None) -> None:
    """An epoch begins; ``predictions``: of each network for the whole training set."""

    def predict(k: int, of: Any = False, **_: Any) -> Tensor:
        return features if of else predictions[k] if isinstance(predictions, list) else predictions

    method.epoch = number
    method.on_epoch(number, lambda k, features=False, **_: predict(k, features))


def batch(index: Tensor, labels: Tensor, **more: Any) -> Any:
    """A batch of random images for these places; ``labels``: of the whole training set."""
    generator = torch.Generator().manual_seed(int(index.sum()))
    values = {"epoch": 0, "network": None, "views": [], "divided": False, **more}
    inputs = values.pop("inputs", torch.randn(len(index), 1, 4, 4, generator=generator))
    return SimpleNamespace(inputs=inputs, labels=labels[index], index=index, **values)


def no_look(k: int, inputs: Tensor, **_: Any) -> Tensor:
    raise AssertionError("this method needs no other forward")


def step(
    method: Any, drawn: Any, logits: Sequence[Tensor], look: Any = no_look
) -> list[tuple[float, Tensor, SimpleNamespace]]:
    """One step of each task: the objective, its gradient by the logits, and the task. What a method learns itself
    takes its step too."""
    tasks = list(method.tasks(drawn, look))
    assert len(tasks) == len(logits)
    leaves = [z.clone().requires_grad_() for z in logits]
    if method.plan is not None:
        method.plan(tasks, [z.detach() for z in leaves])
    found = []
    for z, task in zip(leaves, tasks, strict=True):
        objective = method.loss(z, task).mean()
        (gradient,) = torch.autograd.grad(objective, z, retain_graph=True)
        own = method.auxiliary_optimizer()
        if own is not None:
            parameters = list(method.parameters())
            grads = torch.autograd.grad(objective, parameters, materialize_grads=True)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            own.step()
        found.append((float(objective.detach()), gradient, task))
    return found


def close(name: str, found: Any, expected: Any) -> None:
    """Equal to the tolerance of the table."""
    tolerance = AUTHORS[name][1]
    found, expected = (np.asarray(v.detach() if isinstance(v, Tensor) else v, dtype=float) for v in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0.1 * tolerance)


def same_step(name: str, found: tuple[float, Tensor, Any], reference: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """A method's objective and gradient at the logits, against those of a reference (logits -> objective)."""
    leaf = z.detach().double().clone().requires_grad_()
    objective = reference(leaf)
    (gradient,) = torch.autograd.grad(objective, leaf)
    close(name, found[0], objective)
    close(name, found[1], gradient)


def some_labels(seed: int = 0, samples: int = SAMPLES) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, CLASSES, samples))


def some_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visits(count: int = 5, rows: int = 8, samples: int = SAMPLES) -> list[Tensor]:
    """The places of several batches, most of them met more than once."""
    draws = np.random.default_rng(7)
    return [torch.from_numpy(draws.permutation(samples)[:rows]) for _ in range(count)]


def hot(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[labels]
