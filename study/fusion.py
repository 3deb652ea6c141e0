"""What fusing does to a teacher: the two claims of the paper's abstract, measured for a run's own.

    python study/fusion.py RUN                 # and where and how, as evaluate.py has it

"The fused teacher yields more confident and reliable predictions": the four `quadrants`, at one
alpha and at eleven. "Semantically meaningful probabilities for non-target classes": `non_target`.
Shares are in percent, probabilities are the softmax of the logits as they are distilled, at
temperature 1. RUN/fusion.json keeps what is printed; study/plot.py draws it. The images are those
of the run's test split, of a run with --holdout training images that nobody was trained on: only
by those can an alpha be chosen that is then tested elsewhere.
"""

import dataclasses
import math
import sys
import torch
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import metrics
import richkd
import train
from support import command, files

MODELS = ("teacher", "CLIP", "fused")
QUADRANTS = ("confident_right", "confident_wrong", "unsure_right", "unsure_wrong")

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
    """All of it, of the MODELS: {"alpha", "quadrants": {threshold: {model: `measures`}}, "changes"
    from teacher to fused, "sweep", "non_target": {model: ...}}."""
    logits = dict(zip(MODELS, (teacher_logits, clip_logits,
                               richkd.fuse_logits(teacher_logits, clip_logits, alpha))))
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
def analyse(config):
    """`fusion_table` of a run's test split, with CLIP's scale; also in RUN/fusion.json. config: an
    evaluate.Config. Raises ValueError where the run has no teacher and CLIP, or not any more."""
    config, splits, [student, *_] = evaluate.prepare(dataclasses.replace(config, fused=True))
    test = splits["test"]
    if not {"teacher", "CLIP"} <= student.subjects.keys():
        raise ValueError(f"{student.path.parent} has no teacher and CLIP, as those of richkd have")
    images = next(evaluate.plain_sets(config, splits))
    progress = files.Progress("teacher", len(test.labels))
    logits = train.predict({"teacher": student.subjects["teacher"]}, images.blocks, progress)
    names = student.classes().float().cpu()                                        # (K, D)
    groups = superclasses(config.dataset, test.ids, test.class_ids,
                          Path(config.data_dir) / "wordnet.is_a.txt")
    table = fusion_table(logits["teacher"], student.clip_logits("test", test), test.labels,
                         student.alpha, names @ names.T, groups,
                         torch.Generator().manual_seed(config.seed))
    of = "held-out training" if student.about["settings"]["holdout"] else "test"
    table = {"weights": student.about["weights"], "clip_scale": student.clip_scale,
             "images": f"{len(test.labels)} {of} images", **table}
    files.write_json(student.path.with_name("fusion.json"), table)
    files.note(f"{student.path.with_name('fusion.json')} has all of it")
    return table

def lines(found):
    """What `analyse` found, as lines of text."""
    rows = {"": [f"{name:>9}" for name in (*MODELS, "change")]}

    def add(label, models, name):
        numbers = [models[model][name] for model in MODELS]
        rows[label] = [f"{x:9.{3 if name == 'nll' else 2}f}" for x in (
            *numbers, numbers[2] - numbers[0])]

    for name, label in (("top1", "top-1 %"), ("nll", "NLL, nats"), ("ece", "ECE %")):
        add(label, found["quadrants"]["0.5"], name)  # these are the same at each threshold
    for threshold, models in found["quadrants"].items():
        for name in QUADRANTS:
            add(f"{name.replace('_', ', ')} at {threshold}, %", models, name)
    for name in found["non_target"]["teacher"]:
        label = {"rank_correlation": "rank correlation", "entropy": "entropy, nats"}
        add(f"non-target {label.get(name, name + ' %')}", found["non_target"], name)
    text = [f"fusion at alpha {found['alpha']} on {found['images']}; CLIP's scale "
            f"{found['clip_scale']:.3g}; change: fused less teacher"]
    text += [f"{label:30}{' '.join(cells)}" for label, cells in rows.items()]
    for name, (change, low, high) in found["changes"].items():
        text.append(f"{name.replace('_', ' and ')} at 0.7: {change:+.2f} % of the images, 95 % "
                    f"interval {low:+.2f} to {high:+.2f}")
    text += ["other alphas, from CLIP alone (0) to the teacher alone (1); right, wrong: at 0.7, "
             "confident",
             "  alpha   top-1 %       NLL     ECE %   right %   wrong %"]
    for alpha, top1, nll, ece, right, wrong, *_ in (row.values() for row in found["sweep"]):
        text.append(f"{alpha:7} {top1:9.2f} {nll:9.3f} {ece:9.2f} {right:9.2f} {wrong:9.2f}")
    return text

if __name__ == "__main__":
    flags = ["--run", *sys.argv[1:]] if sys.argv[1:] not in ([], ["--help"]) else sys.argv[1:]
    command.main(lambda: "\n".join(
        lines(analyse(command.parse(evaluate.Config, __doc__, flags)))))
