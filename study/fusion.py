"""What fusing does to a teacher: the two claims of the paper's abstract, measured for a run's own.

"The fused teacher yields more confident and reliable predictions": the four `quadrants`, at one
alpha and at eleven. "Semantically meaningful probabilities for non-target classes": `non_target`.
`python evaluate.py --fused` prints it. Shares are in percent, probabilities are the softmax of the
logits as they are distilled, at temperature 1.
"""

import itertools
import math
from pathlib import Path

import torch

import clip_model
import data
import evaluate
import metrics
import richkd
import targets
import train
from support import files, runs

# Logits (N, K), target (N,) int64 -----------------------------------------------------------------


def measures(logits, target, threshold):
    """{"top1", "nll", "ece", then the shares of the four `quadrants`}, all but NLL in percent."""
    found = {"top1": 100 * metrics.top_k_accuracy(logits, target),
             "nll": metrics.nll(logits, target), "ece": 100 * metrics.ece(logits, target)}
    for name, mask in metrics.quadrants(logits, target, threshold).items():
        found[name] = 100 * mask.double().mean().item()
    return found


def sweep_alpha(teacher_logits, clip_logits, target, threshold=0.7):
    """`measures` of the fused logits at eleven shares of the teacher, "alpha": from CLIP alone (0)
    to the teacher alone (1)."""
    rows = []
    for alpha in (tenth / 10 for tenth in range(11)):
        fused = richkd.fuse_logits(teacher_logits, clip_logits, alpha)
        rows.append({"alpha": alpha, **measures(fused, target, threshold)})
    return rows


def confident_changes(before, after, target, generator, threshold=0.7):
    """By how many of 100 images the confident and right, and the confident and wrong, become more
    from logits `before` to `after`: {name: [change, low, high]}, with the paired bootstrap's 95 %
    interval."""
    old = metrics.quadrants(before, target, threshold)
    new = metrics.quadrants(after, target, threshold)
    changes = {}
    for name in ("confident_right", "confident_wrong"):
        difference = 100 * (new[name].double() - old[name].double())  # (N,): -100, 0 or 100
        interval = metrics.bootstrap_interval(difference, generator)
        changes[name] = [difference.mean().item(), *interval]
    return changes


def mean_ranks(values):
    """Ranks of (n,) numbers, equal ones sharing their mean rank: float64 (n,)."""
    _, index, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[index]


def non_target(logits, target, similarity, groups):
    """What is said of the classes that an image does not show: of q, the softmax of its logits
    without the target's. Returns

    "rank_correlation": Spearman's (1904), over ordered pairs of classes a, b, of the mean q[b] on
        the images of class a with similarity[a, b], (K, K), say of the class names for CLIP
    "entropy": of q, mean over the images, in nats
    "same <what>": q's mass on the target's own group, in percent, for each of the groups,
        {what: the group of each class, int64 (K,)}
    """
    K = logits.shape[1]
    q = logits.double().scatter(1, target[:, None], -math.inf).softmax(dim=1)  # (N, K)
    count = torch.bincount(target, minlength=K)[:, None]
    mean = torch.zeros(K, K, dtype=torch.float64).index_add_(0, target, q) / count  # (K, K)
    pairs = (count > 0) & ~torch.eye(K, dtype=torch.bool)
    ranks = torch.stack([mean_ranks(mean[pairs]), mean_ranks(similarity[pairs])])
    found = {"rank_correlation": ranks.corrcoef()[0, 1].item(),
             "entropy": torch.special.entr(q).sum(dim=1).mean().item()}
    for what, group in groups.items():
        same = group == group[target][:, None]  # (N, K)
        found[f"same {what}"] = 100 * (q * same).sum(dim=1).mean().item()
    return found


def fusion_table(teacher_logits, clip_logits, target, alpha, similarity, groups, generator):
    """All of it, of the models teacher, clip and fused: {"alpha", "quadrants": {threshold: {model:
    `measures`}}, "changes" from teacher to fused, "sweep", "non_target": {model: ...}}."""
    logits = {"teacher": teacher_logits, "clip": clip_logits,
              "fused": richkd.fuse_logits(teacher_logits, clip_logits, alpha)}
    table = {str(threshold): {model: measures(z, target, threshold) for model, z in logits.items()}
             for threshold in (0.5, 0.7, 0.9)}
    return {"alpha": alpha, "quadrants": table,
            "changes": confident_changes(teacher_logits, logits["fused"], target, generator),
            "sweep": sweep_alpha(teacher_logits, clip_logits, target),
            "non_target": {model: non_target(z, target, similarity, groups)
                           for model, z in logits.items()}}


# Five classes a superclass, in the order of the data set's "coarse" labels.
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale, aquarium_fish flatfish ray shark trout,
orchid poppy rose sunflower tulip, bottle bowl can cup plate,
apple mushroom orange pear sweet_pepper, clock keyboard lamp telephone television,
bed chair couch table wardrobe, bee beetle butterfly caterpillar cockroach,
bear leopard lion tiger wolf, bridge castle house road skyscraper, cloud forest mountain plain sea,
camel cattle chimpanzee elephant kangaroo, fox porcupine possum raccoon skunk,
crab lobster snail spider worm, baby boy girl man woman, crocodile dinosaur lizard snake turtle,
hamster mouse rabbit shrew squirrel, maple_tree oak_tree palm_tree pine_tree willow_tree,
bicycle bus motorcycle pickup_truck train, lawn_mower rocket streetcar tank tractor"""


def superclasses(dataset, class_names, class_ids=(), is_a="wordnet.is_a.txt"):
    """{what: the group of each class, int64 (K,)}: CIFAR-100's twenty superclasses, the colours and
    forms of `shapes`, the WordNet parents of class_ids by ImageNet's file of lines "parent child";
    {} where none are known."""
    keys = {}
    if dataset == "cifar100":
        rows = [row.split() for row in CIFAR100_SUPERCLASSES.split(",")]
        group = {name: g for g, row in enumerate(rows) for name in row}
        keys["superclass"] = [group[name] for name in class_names]
    elif dataset == "shapes":
        keys["colour"] = [name.split()[0] for name in class_names]
        keys["form"] = [name.split()[1] for name in class_names]
    elif class_ids and Path(is_a).is_file():
        lines = [line.split() for line in files.read_text(is_a).splitlines() if line.strip()]
        parent = {child: above for above, child in lines}
        keys["WordNet parent"] = [parent.get(own, own) for own in class_ids]
    return {what: torch.tensor([row.index(key) for key in row]) for what, row in keys.items()}


# A run's own teacher, CLIP and alpha --------------------------------------------------------------


class RunTeachers:
    """What taught a run's student, as train.py makes it again from its cache. own: the run's
    train.Config; about: its config.json. Raises ValueError where data or files are others now."""

    def __init__(self, own, about):
        self.own, self.splits, info = own, runs.load_splits(own), data.DATASETS[own.dataset]
        inputs = runs.inputs(own, self.splits)
        differ = runs.difference(about, own, inputs) if "inputs" in about else None
        if differ:
            raise ValueError(f"--fused: what taught this run is not here: it has {differ}")
        self.identities = inputs["data"]
        self.teacher = train.Classifier(train.load_teachers(own, self.splits, inputs), info.mean,
                                        info.std, own.image_size)
        self.clip, self.tokenizer, self.scale = targets.load_clip_teacher(own)

    def analyse(self, seed):
        """`fusion_table` on the run's test split, and CLIP's scale."""
        own, test = self.own, self.splits["test"]
        images = train.resized(test, own.image_size, own).images
        teacher_logits, = train.predict([self.teacher], evaluate.device_blocks(images, own), own)
        cosines, _ = targets.load_targets(own, self.clip, self.tokenizer, {"test": test},
                                          self.identities)["test"]
        templates = clip_model.load_templates(own.prompts or targets.PROMPTS)
        names = clip_model.class_features(self.clip, self.tokenizer, test.class_names, templates)
        names = richkd.ensemble_text_features(names).cpu()  # (K, M, D) -> (K, D)
        groups = superclasses(own.dataset, data.ids_of(test), test.class_ids,
                              Path(own.data_dir) / "wordnet.is_a.txt")
        found = fusion_table(teacher_logits, self.scale * cosines.float().cpu(), test.labels,
                             own.alpha, names @ names.T, groups,
                             torch.Generator().manual_seed(seed))
        return {"clip_scale": self.scale, **found}

    def analyse_corrupted(self, test, config):
        """{"teacher", "clip", "fused"}: top-1 in percent on the corrupted images that the student
        is evaluated on, the mean over corruptions and severities. CLIP sees them at the data set's
        own size."""
        own = self.own
        classes = targets.class_embeddings(own, self.clip, self.tokenizer,
                                           self.splits["test"].class_names)
        tasks = list(itertools.product(evaluate.COMMON, range(1, 6)))
        found = {"teacher": 0.0, "clip": 0.0, "fused": 0.0}
        progress = files.Progress("teacher, CLIP and fused", len(tasks) * len(test.labels))
        for name, severity in tasks:
            images, labels = evaluate.corrupted(test, name, severity, config)
            teacher_logits, clip_logits = [], []
            for block in images:
                teacher_logits += train.predict([self.teacher], [block], own)
                cosines, _ = targets.clip_view(own, self.clip, classes, block)
                clip_logits.append(self.scale * cosines.float().cpu())
                progress.update(progress.done + len(block), f"{name} {severity}")
            logits = {"teacher": torch.cat(teacher_logits), "clip": torch.cat(clip_logits)}
            logits["fused"] = richkd.fuse_logits(logits["teacher"], logits["clip"], own.alpha)
            for who, z in logits.items():
                found[who] += 100 * metrics.top_k_accuracy(z, labels) / len(tasks)
        progress.update(progress.total, keep=True)
        return found


def evaluate_fused(config, test, subject, source):
    """Add to a report what fusing its run's own teacher and CLIP does, on the test split and, where
    there is a `source` of them, on corrupted images. config: an evaluate.Config."""
    fused = subject.report.get("fused", {})
    if fused and evaluate.is_from(source, fused.get("corruptions", {})):
        return
    teaching = RunTeachers(*evaluate.read_run(subject.path.parent, config))
    if not fused:
        fused = subject.report["fused"] = teaching.analyse(config.seed)
        evaluate.save_reports([subject])
    if source:
        fused["corruptions"] = {**source, **teaching.analyse_corrupted(test, config)}
        evaluate.save_reports([subject])


# Printed ------------------------------------------------------------------------------------------


def tables(found):
    """What `RunTeachers.analyse` found, as lines."""
    rows = []

    def add(label, models, name):
        numbers = [models[model][name] for model in ("teacher", "clip", "fused")]
        rows.append((label, [*numbers, numbers[2] - numbers[0]]))

    for name, label in (("top1", "top-1 %"), ("nll", "NLL, nats"), ("ece", "ECE %")):
        add(label, found["quadrants"]["0.5"], name)  # these are the same at each threshold
    for threshold, models in found["quadrants"].items():
        for name in ("confident_right", "confident_wrong", "unsure_right", "unsure_wrong"):
            add(f"{name.replace('_', ', ')} at {threshold}, %", models, name)
    for name in found["non_target"]["teacher"]:
        label = {"rank_correlation": "rank correlation", "entropy": "entropy, nats"}
        add(f"non-target {label.get(name, name + ' %')}", found["non_target"], name)
    if "corruptions" in found:
        corrupted = {model: {"top1": top1} for model, top1 in found["corruptions"].items()}
        add("top-1 %, corruptions", corrupted, "top1")
    lines = [f"fusion at alpha {found['alpha']}, CLIP's scale {found['clip_scale']:.3g}, softmax "
             "at T = 1; change: fused less teacher",
             *evaluate.table("", ("teacher", "CLIP", "fused", "change"), rows)]
    for name, (change, low, high) in found["changes"].items():
        lines.append(f"{name.replace('_', ' and ')} at 0.7: {change:+.2f} % of the images, 95 % "
                     f"interval {low:+.2f} to {high:+.2f}")
    columns = ("top-1 %", "NLL", "ECE %", "sure +", "sure -", "unsure +", "unsure -")
    sweep = [(f"alpha {row['alpha']}", list(row.values())[1:]) for row in found["sweep"]]
    return lines + evaluate.table("sure: from 0.7; +: right", columns, sweep)
