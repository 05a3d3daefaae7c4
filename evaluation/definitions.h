#pragma once
// What every benchmark task is: its files, how they are read, its prompt and its metrics.

#include <headfold/evaluation/data_files.h>
#include <headfold/evaluation/prompts.h>
#include <headfold/evaluation/registry.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// A file that may hold a split, and the file of labels beside it where the documents bring none ("" without).
struct Place {
  std::string documents;
  std::string labels;
};
/// A part of a data set and where it may lie, relative to the data folder (or absolute), in the order tried.
struct Split {
  std::string name;  ///< the harness's: "train", "validation", "test", "dev"
  std::vector<Place> places;
  std::int64_t published = 0;  ///< documents of the published split, 0: not fixed
};
/// The first place of a split that is there. `labels` is empty when there is no such file.
struct FoundSplit {
  std::filesystem::path documents;
  std::filesystem::path labels;
  std::string task;
  std::string obtain;
  std::filesystem::path wanted_labels;  ///< where labels would be, for the message when documents bring none
};

/// Items of a split in the order of the file.
using Reader = std::function<std::vector<Item>(const FoundSplit&)>;

struct Definition {
  std::string name;
  std::string alias;  ///< empty: the name
  std::string version = "1.0";
  std::string about;                       ///< one line, for people
  std::string obtain;                      ///< where the files come from
  std::string dataset_path, dataset_name;  ///< of the harness's configuration
  std::string text_template, target_template;
  Split evaluated;
  Split shots;              ///< without places: the evaluated split itself, or `fixed`
  std::vector<Item> fixed;  ///< shots that are part of the task
  PromptRules rules;
  Reader read;
  DocumentScorer score;
  std::vector<std::string> metrics;            ///< names, for the configuration
  std::function<std::string(const Item&)> by;  ///< means by label, see aggregate()
  /// Tasks that make their documents themselves (no places).
  std::function<std::vector<Item>(const SuiteOptions&)> make;
};

std::vector<Definition>
choice_definitions();  ///< piqa, hellaswag, winogrande, arc_*, openbookqa, boolq, truthfulqa_*, lambada
std::vector<Definition> mmlu_definitions();        ///< mmlu_<subject>, by category
std::vector<Definition> generation_definitions();  ///< gsm8k, gsm8k_cot, xsum
std::vector<Definition> longbench_definitions();   ///< longbench_<name>
std::vector<Definition> retrieval_definitions();   ///< passkey, needle
/// A task of the user's own (docs/evaluation.md). Throws IoError, CorruptFile, InputError naming file and key.
Definition user_definition(const std::filesystem::path& file, const std::filesystem::path& data_dir);

/// The four categories of mmlu, their subjects and how many questions the published test split of each has.
struct MmluSubject {
  std::string name;
  std::int64_t questions;
};
struct MmluCategory {
  std::string name;
  std::vector<MmluSubject> subjects;
};
const std::vector<MmluCategory>& mmlu_categories();

/// Index of `wanted` among `labels`; InputError naming place and `field` when it is not there or there twice.
std::int64_t label_index(const std::vector<std::string>& labels, const std::string& wanted, const std::string& where,
                         const std::string& field);

/// Sets the right choice, and with it the shot's answer and the target.
void set_gold(Item& item, std::int64_t gold);
/// A multiple-choice task with acc and acc_norm, to be filled in.
Definition choice_definition(const std::string& name, const std::string& about);

}  // namespace headfold::evaluation
