# Settings that prepare.sh, train.sh and evaluate.sh share; they source this file after common.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034

# The text is tatoeba (the paper's six languages besides English) or multi30k (three).
CORPUS=${CORPUS:-tatoeba}
require_choice CORPUS tatoeba multi30k
declare -A ALL_LANGUAGES=([tatoeba]="fr de ja ko pt es" [multi30k]="fr de cs")
# Languages to translate from and to English, in the order of their tokens.
LANGUAGES=${LANGUAGES:-${ALL_LANGUAGES[$CORPUS]}}
for language in $LANGUAGES; do
  [[ " ${ALL_LANGUAGES[$CORPUS]} " == *" $language "* ]] ||
    die "LANGUAGES has '$language', but $CORPUS has only: ${ALL_LANGUAGES[$CORPUS]}"
done
[[ -n $LANGUAGES ]] || die "LANGUAGES must name at least one of: ${ALL_LANGUAGES[$CORPUS]}"

# en-fr fr-en en-de de-en ...: both directions of each pair.
DIRECTIONS=()
for language in $LANGUAGES; do DIRECTIONS+=("en-$language" "$language-en"); done
LANG_PAIRS=$(IFS=,; printf '%s' "${DIRECTIONS[*]}")
LANGS=en,${LANGUAGES// /,}
TASK_FLAGS=(--task translation_multilingual_gnmt --langs "$LANGS")

WORK_FOLDER=${WORK:-$REPOSITORY/recipes/multilingual/work/$CORPUS-${LANGUAGES// /-}}
SPLITS=(train valid test)
