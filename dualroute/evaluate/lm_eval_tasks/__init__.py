"""Tasks of lm-evaluation-harness on local files: YAMLs in its own form, usable by it alone too
(``lm_eval --include_path``).  Their files are given by the suite or looked for in $DUALROUTE_DATA."""
