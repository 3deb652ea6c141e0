#!/usr/bin/env bash
# The paper's claims in miniature: several methods over several seeds with one teacher and one
# schedule, all evaluated on the test split, the shift splits and under corruptions. It only calls
# train.py, evaluate.py and study/*.py, from the repository's root:
#
#   bash study/study.sh methods shapes 5 30     # part, data set, seeds, epochs, flags of train.py
#   bash study/study.sh methods cifar100 3 240 --teacher resnet32x4 --student resnet8x4 --amp
#
# The parts: methods (the main table), sweeps (alpha, lam, templates, scale of RichKD), core (kd,
# richkd, richkd-l, scratch), fraction (kd, richkd, scratch), pair (kd, richkd) and published (the
# baselines with the settings of study/published.py). With a number, as in fraction-30, a part sees
# that percentage of the training images, and so does the teacher; give it more epochs. TAG=-name
# names runs and results of other flags apart. JOBS runs at a time, 1 by default. EVALUATE are
# evaluate.py's flags, --corruptions by default. Runs lie below runs/study/<data set>-<epochs>; the
# same command skips those that are finished, and parts share the runs that they have in common. The
# reports end in study/results/<data set>-<part><TAG>.json, of which
#   python study/compare.py study/results/<data set>-<part><TAG>.json
# makes the tables again.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: bash study/study.sh PART DATASET SEEDS EPOCHS [flags of train.py]" >&2; exit 2; }
part=$1 dataset=$2 seeds=$3 epochs=$4
shift 4
kind=${part%-[0-9]*}
share=${part#"$kind"}  # -30, or nothing
root=runs/study/$dataset-$epochs
results=study/results/$dataset-$part${TAG:-}.json
case $kind in
methods) methods="kd richkd scratch crd dkd kd-ls richkd-l richkd-f" ;;
sweeps | pair) methods="kd richkd" ;;
core) methods="kd richkd richkd-l scratch" ;;
fraction) methods="kd richkd scratch" ;;
published) methods="scratch crd" ;;
*)
    echo "unknown part $part; known: methods, sweeps, core, fraction, pair, published; or one with a percentage, as pair-30" >&2
    exit 2 ;;
esac
mkdir -p "$root" study/results
echo "a photo of a {}" > "$root/one-template.txt"

read_by() {  # the flags for all runs, but those that this one does not read, which train.py refuses
    local clip="clip|clip-activation|clip-scale|bpe|prompts" teacher="teacher|teacher-weights"
    local feature="num-negatives|negatives"
    case $1 in
    scratch*) unread="$clip|$teacher|$feature" ;;
    crd*) unread=$clip ;;
    kd* | dkd* | mlkd*) unread="$clip|$feature" ;;
    richkd-l*) unread=$feature ;;
    clip-alone*) unread=$teacher ;;
    *) unread=none ;;
    esac
    sed -E "s/ --($unread)( [^-][^ ]*)+//g" <<< " $flags"
}

flags="--dataset $dataset $*"
list=$(for seed in $(seq 0 $((seeds - 1))); do  # a line a run: the name of its folder, its own flags
    end="$share${TAG:-}-s$seed --seed $seed --epochs $epochs ${share:+--fraction ${share#-}e-2}"
    for method in $methods; do
        echo "$method$end --method $method"
    done
    case $kind in
    methods)
        echo "dkd-published$end --method dkd --temperature 4 --logit-weight 1"
        echo "clip-alone$end --alpha 0 --lam 0" ;;
    published)
        echo "kd-published$end --method kd --temperature 4 --ce-weight 0.1 --logit-weight 0.9"
        echo "dkd-published$end --method dkd --temperature 4 --logit-weight 1"
        echo "kd-ls-published$end --method kd-ls --temperature 2 --ce-weight 0.1 --logit-weight 9" ;;
    sweeps)
        for value in 0 0.3 0.5 0.9 1; do
            echo "alpha-$value$end --alpha $value"
            echo "lam-$value$end --lam $value"
        done
        echo "one-template$end --prompts $root/one-template.txt"
        echo "clip-scale-1$end --clip-scale 1" ;;
    esac
done | while read -r name own; do echo "$name$(read_by "$name") $own"; done)
folders=$(cut -d " " -f 1 <<< "$list" | sed "s|^|$root/|")
finished=$(for folder in $folders; do ls "$folder/summary.json" 2> /dev/null || true; done | wc -l)
echo "$part: $finished of $(wc -l <<< "$list") runs are finished"
ROOT=$root xargs -P "${JOBS:-1}" -L 1 bash -c \
    'python train.py --out "$ROOT/$0" "$@" > "$ROOT/$0.txt" && grep "^student" "$ROOT/$0.txt"' \
    <<< "$list"
flags=${EVALUATE---corruptions}
if [ "$dataset" = shapes ]; then flags="--shift $flags"; fi
places=$(grep -oE -- '--(data-dir|cache-dir|device|workers) [^ ]+' <<< "$*" || true)
python evaluate.py --run $folders $places $flags
fusing=$(grep -m 1 richkd <<< "$folders" || true)  # one run's teachers stand for all
if [ "$fusing" ]; then
    python evaluate.py --run "$fusing" $places $flags --fused
    python study/fusion.py "$fusing" $places
    if python -c "import matplotlib" 2> /dev/null; then
        python study/plot.py "$fusing" $places ${EVALUATE---corruptions}
    fi
fi
python - $folders > "$results" << 'END'
import json, pathlib, sys
reports = []
for folder in map(pathlib.Path, sys.argv[1:]):
    report = json.loads((folder / "report.json").read_text())
    del report["digest"], report["format"]  # small: without the corruptions one by one, and
    report["sets"] = {name: rows for name, rows in report["sets"].items()
                      if name == "corruptions" or "source" not in rows["key"]}
    for rows in report["sets"].values():  # without the points of diagrams, and classes one by one
        for who in rows.keys() - {"key"}:
            rows[who] = {name: x for name, x in rows[who].items()
                         if name not in ("calibration", "by_class")}
    if (folder / "fusion.json").is_file():
        report["fusion"] = json.loads((folder / "fusion.json").read_text())
    reports.append(json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 6)))
print("[" + ",\n".join(map(json.dumps, reports)) + "]")
END
python study/compare.py "$results"
