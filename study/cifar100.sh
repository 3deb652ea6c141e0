#!/usr/bin/env bash
# CIFAR-100: what the field published beside what this code gives, and RichKD beside KD. From the
# repository's root, a part after the other; the same command goes on with what is left of it:
#
#   bash study/cifar100.sh baselines 1 240 --amp          # part, seeds, epochs, flags of train.py
#   bash study/cifar100.sh richkd 3 240 --clip ViT-L/14 --amp
#   bash study/cifar100.sh tenth 5 60 --data-dir cifar100.zip --clip clip-cifar.pt --bpe FILE
#
# baselines: scratch, kd, crd, dkd and kd-ls with their published settings, beside the published
#   numbers (study/published.py); resnet110 -> resnet20 and resnet32x4 -> resnet8x4
# richkd: kd, richkd-l, richkd and scratch for the same pairs, with corruptions
# tenth: the same of resnet20 -> resnet8 with 10 % of the training images, which two CPU cores can
#   do, too; a fifth of the test images is corrupted
# 240 epochs are the paper's; 60 keep the shape of the schedule. On an H100 with --amp 240 epochs of
# resnet20 beside resnet110 are 5 (scratch) to 9 minutes (richkd), of resnet8x4 4 to 6: a seed of
# baselines is an hour and the teachers, of richkd half an hour and CLIP's targets. tenth: three
# seeds took 5 minutes there, in half of the GPU; on two CPU cores a seed is an hour and a half.
# A teacher is trained first and kept; with PAIRS="resnet32x4:resnet8x4" there is one pair, and
# --teacher-weights FILE names its public checkpoint.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash study/cifar100.sh baselines|richkd|tenth SEEDS EPOCHS [flags of train.py]" >&2; exit 2; }
part=$1 seeds=$2 epochs=$3
shift 3
case $part in
baselines) kind=published EVALUATE= ;;
richkd) kind=core EVALUATE=--corruptions ;;
tenth) kind=core-10 EVALUATE="--corruptions --corrupted-share 0.2" PAIRS=${PAIRS:-resnet20:resnet8} ;;
*) echo "unknown part $part; known: baselines, richkd, tenth" >&2; exit 2 ;;
esac
for pair in ${PAIRS:-resnet110:resnet20 resnet32x4:resnet8x4}; do
    TAG=-${pair/:/-} EVALUATE=$EVALUATE bash study/study.sh $kind cifar100 "$seeds" "$epochs" \
        --teacher "${pair%:*}" --student "${pair#*:}" "$@"
done
if [ $part = baselines ]; then python study/published.py study/results/cifar100-published-*.json; fi
