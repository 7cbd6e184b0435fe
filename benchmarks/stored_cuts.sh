#!/usr/bin/env bash
# Cuts of the kernel for few rows that a model of it calls likely, for three formats: 100 s on an H200.
set -u
sweep() { python benchmarks/stored_linears.py --sweep --shapes 8192,8192 --batches 1 16 64 --limit 12 --seconds 40 --repeats 10 "$@"; }
sweep --formats nf4 --out "${1:?folder}/cuts_nf4.csv" --configs \
  "fragments 1x64x512 w16 s4 p1 table early" "fragments 1x64x512 w16 s4 p1 table" "fragments 1x64x512 w16 s2 p1 table early" \
  "fragments 1x32x512 w8 s4 p2 table early" "fragments 1x16x512 w4 s2 p4 table early" \
  "fragments 16x64x512 w16 s2 p1 table early" "fragments 16x128x256 w8 s2 p1 table early" "fragments 16x256x128 w8 s2 p1 table" \
  "fragments 16x256x128 w8 s2 p1 table early" "fragments 16x128x512 w8 s1 p1 table early" "fragments 16x128x128 w4 s2 p2 table early" \
  "fragments 64x256x128 w8 s1 p1 table early" "fragments 64x128x256 w8 s1 p1 table early" "fragments 64x64x512 w8 s1 p1 table early"
sweep --formats "int4 g128" nvfp4 --out "$1/cuts_others.csv" --configs \
  "fragments 1x64x512 w16 s4 p1 table early" "fragments 1x64x512 w16 s2 p1 table early" \
  "fragments 16x64x512 w16 s2 p1 table early" "fragments 16x256x128 w8 s2 p1 table early" "fragments 64x256x128 w8 s1 p1 table early"
