// Every job on missing, truncated, misshapen and nonsensical input: the documented exit code, a message that names what
// is wrong, nothing left behind, and no hang when there are two ranks.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/checkpoint/writer.h>
#include <sys/stat.h>

#include <map>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using Arguments = std::vector<std::string>;

/// Broken inputs, made once for the whole program.
class Inputs {
 public:
  static const Inputs& get() {
    static const Inputs inputs;
    return inputs;
  }
  ~Inputs() {
    std::error_code code;
    fs::remove_all(root, code);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;
  fs::path root;

 private:
  Inputs() : root(fs::temp_directory_path() / fmt::format("headfold-errors-{}", ::getpid())) {
    fs::create_directories(root);
    const fs::path good = demo_model("prose-llama");
    const std::string weights = read_file(good / "model.safetensors");
    const std::string config = read_file(good / "config.json");
    const std::string tokenizer = read_file(good / "tokenizer.model");

    model("truncated-weights");
    write_file(root / "truncated-weights" / "model.safetensors", weights.substr(0, weights.size() / 2));
    model("no-weights");
    fs::remove(root / "no-weights" / "model.safetensors");
    model("broken-config");
    write_file(root / "broken-config" / "config.json", config.substr(0, config.size() / 2));
    model("absurd-config");
    Json absurd = Json::parse(config);
    absurd["num_attention_heads"] = 7;
    write_json(root / "absurd-config" / "config.json", absurd);
    model("wrong-shape");
    Json wider = Json::parse(config);
    wider["intermediate_size"] = 700;
    write_json(root / "wrong-shape" / "config.json", wider);
    model("no-tokenizer");
    fs::remove(root / "no-tokenizer" / "tokenizer.model");
    model("truncated-tokenizer");
    write_file(root / "truncated-tokenizer" / "tokenizer.model", tokenizer.substr(0, tokenizer.size() / 2));
    fs::create_directories(root / "empty-folder");
    fs::create_directories(root / "pipe-config");
    if (::mkfifo((root / "pipe-config" / "config.json").c_str(), 0600) != 0) throw InternalError("no pipe");
    for (const auto& entry : fs::directory_iterator(demo_model("prose-bloom")))
      headfold::copy_file(entry.path(), root / "no-bos" / entry.path().filename());
    Json without_bos = read_json(root / "no-bos" / "config.json");
    without_bos["bos_token_id"] = nullptr;
    write_json(root / "no-bos" / "config.json", without_bos);

    write_file(root / "broken.jsonl", "{\"text\": \"good\"}\n{\"text\": \"cut o");
    write_file(root / "short.jsonl", "{\"text\": \"Too short.\"}\n");
    write_file(root / "other-field.jsonl", "{\"body\": \"words\"}\n");
    write_file(root / "latin1.txt", "caf\xE9 at noon, again and again");
    write_file(root / "not-hdf5.h5", "this is no HDF5 file, only text");
    write_file(root / "unknown.bin", "neither this nor that");
    write_file(root / "a-file", "a file where a folder belongs");
    checkpoint::write_safetensors(root / "ids.safetensors", {{"input_ids", at::ones({1, 8}, at::kLong)}});
    checkpoint::write_safetensors(root / "ids-float.safetensors", {{"input_ids", at::ones({1, 8}, at::kFloat)}});
    checkpoint::write_safetensors(root / "ids-shape.safetensors", {{"input_ids", at::ones({8}, at::kLong)}});
    checkpoint::write_safetensors(root / "ids-vocab.safetensors", {{"input_ids", at::full({1, 8}, 5000, at::kLong)}});
    checkpoint::write_safetensors(root / "ids-name.safetensors", {{"ids", at::ones({1, 8}, at::kLong)}});
    const std::string ids = read_file(root / "ids.safetensors");
    write_file(root / "ids-truncated.safetensors", ids.substr(0, ids.size() - 8));

    // Real artefacts: statistics of the other demo model, a conversion, and truncated ones.
    make({"calibrate", "--model", demo_model("prose-bloom"), "--data", demo_text("calibration.jsonl"), "--samples", "2",
          "--seq-len", "32", "--out", root / "bloom.h5"});
    const std::string statistics = read_file(root / "bloom.h5");
    write_file(root / "truncated.h5", statistics.substr(0, statistics.size() / 2));
    for (const char* name : {"converted", "truncated-converted"})
      make({"convert", "--model", good, "--kv-heads", "4", "--keys", "meanpool", "--values", "meanpool", "--out",
            root / name});
    const std::string folded = read_file(root / "converted" / "model.safetensors");
    write_file(root / "truncated-converted" / "model.safetensors", folded.substr(0, folded.size() / 2));
  }

  void make(const std::vector<std::string>& arguments) const {
    const Outcome made = run_headfold(1, arguments, root / "make.log");
    if (made.code != 0) throw InternalError("an input of these tests could not be made: " + made.output);
    fs::remove(root / "make.log");
  }

  /// A copy of the demo model that a case will break.
  void model(const std::string& name) {
    fs::create_directories(root / name);
    for (const auto& entry : fs::directory_iterator(demo_model("prose-llama")))
      headfold::copy_file(entry.path(), root / name / entry.path().filename());
  }
};

/// `arguments`: "@name" stands for a broken input, "%" for this case's output path, "+llama", "+bloom", "+text",
/// "+heldout" for good input.
struct Case {
  std::string name;
  std::string arguments;  ///< separated by single spaces
  int code;
  std::vector<std::string> mentions;  ///< all must appear in the output
  bool two_ranks = false;             ///< under mpirun with two ranks instead of alone
};

std::ostream& operator<<(std::ostream& stream, const Case& one) {
  return stream << one.name;
}

constexpr int kUsage = 64, kBadInput = 65, kIo = 74;

const std::vector<Case>& cases() {
  static const std::vector<Case> list = {
      // The program itself.
      {"no_job", "", kUsage, {"usage"}},
      {"unknown_job", "fold", kUsage, {"fold", "calibrate"}, true},

      // calibrate
      {"calibrate_missing_model", "calibrate --model @absent --data +text --out %.h5", kIo, {"absent"}, true},
      {"calibrate_truncated_model",
       "calibrate --model @truncated-weights --data +text --samples 2 --seq-len 32 --out %.h5",
       kBadInput,
       {"model.safetensors"},
       true},
      {"calibrate_wrong_shape",
       "calibrate --model @wrong-shape --data +text --samples 2 --seq-len 32 --out %.h5",
       kBadInput,
       {"model.safetensors", "700", "688"},
       true},
      {"calibrate_broken_config",
       "calibrate --model @broken-config --data +text --out %.h5",
       kBadInput,
       {"config.json"}},
      {"calibrate_absurd_config",
       "calibrate --model @absurd-config --data +text --out %.h5",
       kBadInput,
       {"config.json", "7"}},
      {"calibrate_no_weights", "calibrate --model @no-weights --data +text --out %.h5", kIo, {"no-weights"}},
      {"calibrate_no_tokenizer", "calibrate --model @no-tokenizer --data +text --out %.h5", kIo, {"tokenizer"}},
      {"calibrate_truncated_tokenizer",
       "calibrate --model @truncated-tokenizer --data +text --out %.h5",
       kBadInput,
       {"tokenizer.model"}},
      {"calibrate_missing_text",
       "calibrate --model +llama --data @absent.jsonl --out %.h5",
       kIo,
       {"absent.jsonl"},
       true},
      {"calibrate_broken_text",
       "calibrate --model +llama --data @broken.jsonl --out %.h5",
       kBadInput,
       {"broken.jsonl", "2"}},
      {"calibrate_wrong_field",
       "calibrate --model +llama --data @other-field.jsonl --out %.h5",
       kBadInput,
       {"other-field.jsonl", "text"}},
      {"calibrate_short_text", "calibrate --model +llama --data @short.jsonl --out %.h5", kBadInput, {"128"}},
      {"calibrate_not_utf8", "calibrate --model +llama --data @latin1.txt --out %.h5", kBadInput, {"latin1.txt"}},
      {"calibrate_no_samples",
       "calibrate --model +llama --data +text --samples 0 --out %.h5",
       kUsage,
       {"samples"},
       true},
      {"calibrate_absurd_samples",
       "calibrate --model +llama --data +text --seq-len 64 --samples 4000000000 --out %.h5",
       kBadInput,
       {"4000000000", "--samples"}},
      {"calibrate_absurd_threads",
       "calibrate --model +llama --data +text --threads 99999999 --out %.h5",
       kUsage,
       {"--threads"}},
      {"calibrate_timeout_that_is_no_number",
       "calibrate --model +llama --data +text --comm-timeout nan --out %.h5",
       kUsage,
       {"--comm-timeout"}},
      {"evaluate_foreign_tokenizer",
       "evaluate --model +llama --reference +bloom --data +heldout --limit 1 --out %",
       kBadInput,
       {"tokenizers"}},
      {"convert_onto_another_conversion",
       "convert --model +llama --kv-heads 2 --keys meanpool --values meanpool --out @converted",
       kUsage,
       {"converted", "--overwrite"}},
      {"calibrate_negative_length",
       "calibrate --model +llama --data +text --seq-len -5 --out %.h5",
       kUsage,
       {"seq-len"}},
      {"calibrate_config_that_is_a_pipe",
       "calibrate --model @pipe-config --data +text --samples 2 --out %.h5",
       kIo,
       {"config.json", "is not a regular file"}},
      {"calibrate_bos_of_a_tokenizer_without",
       "calibrate --model @no-bos --data +text --samples 2 --seq-len 32 --bos always --out %.h5",
       kBadInput,
       {"InputError", "this tokenizer has none"},
       true},
      {"evaluate_bos_of_a_tokenizer_without",
       "evaluate --model @no-bos --data +heldout --seq-len 32 --limit 1 --bos always --out %",
       kBadInput,
       {"this tokenizer has none"}},
      {"calibrate_too_many_stages",
       "calibrate --model +llama --data +text --pipeline-ranks 9 --out %.h5",
       kUsage,
       {"9"},
       true},
      {"calibrate_unknown_option", "calibrate --model +llama --data +text --sample 3 --out %.h5", kUsage, {"sample"}},
      {"calibrate_no_output_named", "calibrate --model +llama --data +text", kUsage, {"out"}},
      {"calibrate_output_below_a_file",
       "calibrate --model +llama --data +text --samples 2 --seq-len 32 --out @a-file/x.h5",
       kIo,
       {"a-file"},
       true},

      // convert
      {"convert_missing_model",
       "convert --model @absent --calibration @bloom.h5 --kv-heads 4 --out %",
       kIo,
       {"absent"},
       true},
      {"convert_truncated_model",
       "convert --model @truncated-weights --kv-heads 4 --keys meanpool --values meanpool --out %",
       kBadInput,
       {"model.safetensors"},
       true},
      {"convert_wrong_shape",
       "convert --model @wrong-shape --kv-heads 4 --keys meanpool --values meanpool --out %",
       kBadInput,
       {"wrong-shape", "700", "688"},
       true},
      {"convert_missing_statistics",
       "convert --model +llama --calibration @absent.h5 --kv-heads 4 --out %",
       kIo,
       {"absent.h5"},
       true},
      {"convert_truncated_statistics",
       "convert --model +bloom --calibration @truncated.h5 --keys norope --key-metric act --kv-heads 4 --out %",
       kBadInput,
       {"truncated.h5"},
       true},
      {"convert_no_statistics_at_all",
       "convert --model +llama --calibration @not-hdf5.h5 --kv-heads 4 --out %",
       kBadInput,
       {"not-hdf5.h5"}},
      {"convert_statistics_of_another_model",
       "convert --model +llama --calibration @bloom.h5 --kv-heads 4 --out %",
       kBadInput,
       {"bloom.h5"},
       true},
      {"convert_heads_that_do_not_divide",
       "convert --model +llama --kv-heads 3 --keys meanpool --values meanpool --out %",
       kUsage,
       {"3", "1, 2, 4"},
       true},
      {"convert_negative_heads",
       "convert --model +llama --kv-heads -4 --keys meanpool --values meanpool --out %",
       kUsage,
       {"-4"}},
      {"convert_heads_no_number",
       "convert --model +llama --kv-heads four --keys meanpool --values meanpool --out %",
       kUsage,
       {"four"}},
      {"convert_ratio_out_of_range",
       "convert --model +llama --ratio 1.5 --keys meanpool --values meanpool --out %",
       kUsage,
       {"1.5"}},
      {"convert_unknown_fold",
       "convert --model +llama --kv-heads 4 --keys origami --out %",
       kUsage,
       {"origami", "rope-commuting"}},
      {"convert_fold_without_rope",
       "convert --model +bloom --calibration @bloom.h5 --kv-heads 4 --keys rope-commuting --out %",
       kUsage,
       {"norope"}},
      {"convert_missing_plan", "convert --model +llama --plan @absent.json --out %", kIo, {"absent.json"}},
      {"convert_refit_without_text",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --out %",
       kUsage,
       {"refit-data"},
       true},
      {"convert_refit_text_without_refit",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit-data +text --out %",
       kUsage,
       {"--refit"}},
      {"convert_refit_missing_text",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data @absent.jsonl --out "
       "%",
       kIo,
       {"absent.jsonl"},
       true},
      {"convert_refit_truncated_text",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data @broken.jsonl --out "
       "%",
       kBadInput,
       {"broken.jsonl", "2"},
       true},
      {"convert_refit_text_that_is_too_short",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data @short.jsonl "
       "--refit-samples 4 --seq-len 32 --out %",
       kBadInput,
       {"tokens"},
       true},
      {"convert_refit_too_few_samples",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data +text "
       "--refit-samples 1 --out %",
       kUsage,
       {"refit-samples"}},
      {"convert_refit_no_ridge",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data +text --refit-ridge "
       "0 --out %",
       kUsage,
       {"refit-ridge"},
       true},
      {"convert_refit_unknown_part",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data +text --refit-parts "
       "output+soul --out %",
       kUsage,
       {"output+soul", "queries"}},
      {"convert_refit_keys_without_queries",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --refit --refit-data +text --refit-parts "
       "keys --out %",
       kUsage,
       {"queries"}},
      {"convert_budget_without_text",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --budget dp --out %",
       kUsage,
       {"probe-data"},
       true},
      {"convert_budget_missing_text",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --budget dp --probe-data "
       "@absent.jsonl --out %",
       kIo,
       {"absent.jsonl"},
       true},
      {"convert_budget_no_windows",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --budget dp --probe-data "
       "+heldout --probe-windows 0 --out %",
       kUsage,
       {"probe-windows"}},
      {"convert_budget_that_no_stock_loader_reads",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --budget dp --stock "
       "--probe-data +heldout --out %",
       kUsage,
       {"--stock"}},
      {"convert_stock_of_a_layout_that_is_not",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --keys post-rotation --stock "
       "--out %",
       kUsage,
       {"--stock", "projected"}},
      {"convert_search_with_alibi",
       "convert --model +bloom --kv-heads 4 --key-metric weights --value-metric weights --grouping search --out %",
       kUsage,
       {"ALiBi"},
       true},
      {"convert_search_without_seeds",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --grouping search "
       "--grouping-seeds 0 --out %",
       kUsage,
       {"grouping-seeds"}},
      {"convert_slow_band_too_wide",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --slow-band 17 --out %",
       kUsage,
       {"16"},
       true},
      {"convert_tensor_parallel_that_does_not_divide",
       "convert --model +llama --kv-heads 4 --key-metric weights --value-metric weights --tensor-parallel 8 --out %",
       kUsage,
       {"8", "4"},
       true},
      {"convert_compare_without_text",
       "convert --model +llama --kv-heads 4 --compare meanpool --out %",
       kUsage,
       {"probe-data"},
       true},
      {"convert_compare_text_that_is_too_short",
       "convert --model +llama --kv-heads 4 --compare meanpool --probe-data @short.jsonl --probe-windows 3 --seq-len "
       "32 --out %",
       kBadInput,
       {"tokens"},
       true},
      {"convert_compare_unknown_fold",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool,origami --out %",
       kUsage,
       {"origami", "rope-commuting", "paper"},
       true},
      {"convert_compare_unknown_metric",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "rope-commuting:speed --out %",
       kUsage,
       {"speed", "act+query"}},
      {"convert_compare_unknown_option",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool@colour=red --out %",
       kUsage,
       {"colour", "slow-band"},
       true},
      {"convert_compare_option_without_value",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "query@slow-band --out %",
       kUsage,
       {"slow-band", "VALUE"}},
      {"convert_compare_option_no_number",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "query@polish=many --out %",
       kUsage,
       {"polish"},
       true},
      {"convert_compare_switch_with_value",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "query@refit=yes --out %",
       kUsage,
       {"refit"}},
      {"convert_compare_two_slashes",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "rope-commuting/svd/svd --out %",
       kUsage,
       {"rope-commuting/svd/svd"}},
      {"convert_compare_empty_entry",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool,,weights --out %",
       kUsage,
       {"empty entry"}},
      {"convert_compare_two_sizes",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool@kv-heads=4@ratio=0.5 --out %",
       kUsage,
       {"kv-heads", "ratio"}},
      {"convert_compare_refit_without_text",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool@refit --out %",
       kUsage,
       {"refit-data"},
       true},
      {"convert_compare_refit_text_without_refit",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare meanpool "
       "--refit-data +text --out %",
       kUsage,
       {"@refit"}},
      {"convert_compare_missing_refit_text",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "meanpool@refit --refit-data @absent.jsonl --out %",
       kIo,
       {"absent.jsonl"},
       true},
      {"convert_compare_and_keys",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare meanpool "
       "--keys meanpool --out %",
       kUsage,
       {"--keys", "--compare"}},
      {"convert_compare_only_what_cannot_be",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare "
       "norope:weights/svd:weights,query --out %",
       kUsage,
       {"rope-commuting"},
       true},
      {"convert_compare_heads_that_do_not_divide",
       "convert --model +llama --kv-heads 3 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare meanpool "
       "--out %",
       kUsage,
       {"1, 2, 4, 8"},
       true},
      {"convert_compare_over_foreign_files",
       "convert --model +llama --kv-heads 4 --probe-data +heldout --probe-windows 2 --seq-len 32 --compare meanpool "
       "--out @no-tokenizer",
       kUsage,
       {"no-tokenizer"}},
      {"convert_over_foreign_files",
       "convert --model +llama --kv-heads 4 --keys meanpool --values meanpool --out @no-tokenizer",
       kUsage,
       {"no-tokenizer"}},

      // evaluate
      {"evaluate_missing_model", "evaluate --model @absent --data +heldout --out %", kIo, {"absent"}, true},
      {"evaluate_truncated_model",
       "evaluate --model @truncated-weights --data +heldout --limit 2 --out %",
       kBadInput,
       {"model.safetensors"},
       true},
      {"evaluate_wrong_shape",
       "evaluate --model @wrong-shape --data +heldout --limit 2 --out %",
       kBadInput,
       {"model.safetensors", "700"},
       true},
      {"evaluate_missing_text", "evaluate --model +llama --data @absent.txt --out %", kIo, {"absent.txt"}, true},
      {"evaluate_short_text", "evaluate --model +llama --data @short.jsonl --out %", kBadInput, {"short.jsonl", "256"}},
      {"evaluate_broken_text", "evaluate --model +llama --data @broken.jsonl --out %", kBadInput, {"broken.jsonl"}},
      {"evaluate_missing_reference",
       "evaluate --model +llama --reference @absent --data +heldout --out %",
       kIo,
       {"absent"}},
      {"evaluate_other_vocabulary",
       "evaluate --model +llama --reference +golden --data +heldout --limit 2 --out %",
       kBadInput,
       {"vocabular"},
       true},
      {"evaluate_unknown_task",
       "evaluate --model +llama --data +heldout --tasks ppl_blocks,chess --out %",
       kUsage,
       {"chess"},
       true},
      {"evaluate_negative_limit", "evaluate --model +llama --data +heldout --limit -1 --out %", kUsage, {"limit"}},
      {"evaluate_window_of_one", "evaluate --model +llama --data +heldout --seq-len 1 --out %", kUsage, {"seq-len"}},
      {"evaluate_unknown_dtype", "evaluate --model +llama --data +heldout --dtype int3 --out %", kUsage, {"int3"}},
      {"evaluate_unknown_bos", "evaluate --model +llama --data +heldout --bos perhaps --out %", kUsage, {"perhaps"}},
      {"evaluate_output_is_a_file",
       "evaluate --model +llama --data +heldout --limit 1 --out @a-file",
       kIo,
       {"a-file"},
       true},

      // export
      {"export_ordinary_model", "export --model +llama --format expanded --out %", kBadInput, {"nothing to expand"}},
      {"export_unknown_format", "export --model +llama --format gguf --out %", kUsage, {"gguf", "expanded"}},
      {"export_missing_model", "export --model @no-such-folder --format expanded --out %", kIo, {"no-such-folder"}},
      {"export_bad_dtype", "export --model +llama --format expanded --dtype int8 --out %", kUsage, {"int8"}},
      {"export_onto_itself", "export --model @converted --format expanded --out @converted", kUsage, {"itself"}},

      // logits
      {"logits_missing_model",
       "logits --model @absent --ids @ids.safetensors --out %.safetensors",
       kIo,
       {"absent"},
       true},
      {"logits_truncated_model",
       "logits --model @truncated-weights --ids @ids.safetensors --out %.safetensors",
       kBadInput,
       {"model.safetensors"}},
      {"logits_wrong_shape",
       "logits --model @wrong-shape --ids @ids.safetensors --out %.safetensors",
       kBadInput,
       {"700"}},
      {"logits_missing_ids",
       "logits --model +llama --ids @absent.safetensors --out %.safetensors",
       kIo,
       {"absent.safetensors"},
       true},
      {"logits_truncated_ids",
       "logits --model +llama --ids @ids-truncated.safetensors --out %.safetensors",
       kBadInput,
       {"ids-truncated.safetensors"},
       true},
      {"logits_ids_of_another_type",
       "logits --model +llama --ids @ids-float.safetensors --out %.safetensors",
       kBadInput,
       {"ids-float.safetensors"}},
      {"logits_ids_of_another_shape",
       "logits --model +llama --ids @ids-shape.safetensors --out %.safetensors",
       kBadInput,
       {"ids-shape.safetensors"}},
      {"logits_ids_beyond_the_vocabulary",
       "logits --model +llama --ids @ids-vocab.safetensors --out %.safetensors",
       kBadInput,
       {"5000"},
       true},
      {"logits_ids_of_another_name",
       "logits --model +llama --ids @ids-name.safetensors --out %.safetensors",
       kBadInput,
       {"input_ids"}},
      {"logits_unknown_dtype",
       "logits --model +llama --ids @ids.safetensors --dtype half --out %.safetensors",
       kUsage,
       {"half"}},

      // inspect
      {"inspect_missing", "inspect @absent", kIo, {"absent"}, true},
      {"inspect_truncated_weights", "inspect @truncated-weights", kBadInput, {"model.safetensors"}, true},
      {"inspect_truncated_statistics", "inspect @truncated.h5", kBadInput, {"truncated.h5"}},
      {"inspect_unknown_file", "inspect @unknown.bin", kBadInput, {"unknown.bin"}},
      {"inspect_nothing_named", "inspect", kUsage, {}},

      // synthesize
      {"synthesize_unknown_shape", "synthesize --shape llama9-7t --out %", kUsage, {"llama9-7t"}, true},
      {"synthesize_broken_shape_file",
       "synthesize --shape @broken-config/config.json --out %",
       kBadInput,
       {"config.json"},
       true},
      {"synthesize_negative_seed", "synthesize --shape llama2-7b --layers 1 --seed -1 --out %", kUsage, {"--seed -1"}},
      {"synthesize_no_layers", "synthesize --shape llama2-7b --layers 0 --out %", kUsage, {"layers"}},
      {"synthesize_heads_that_do_not_divide",
       "synthesize --shape llama2-7b --layers 1 --kv-heads 5 --out %",
       kUsage,
       {"5"},
       true},

      // verify
      {"verify_missing_model", "verify --model @absent --original +llama --data +heldout", kIo, {"absent"}, true},
      {"verify_truncated_model",
       "verify --model @truncated-converted --original +llama --data +heldout",
       kBadInput,
       {"truncated-converted"},
       true},
      {"verify_truncated_original",
       "verify --model @converted --original @truncated-weights --data +heldout",
       kBadInput,
       {"truncated-weights"}},
      {"verify_another_original",
       "verify --model @converted --original +golden --data +heldout",
       kBadInput,
       {"headfold.json"},
       true},
      {"verify_missing_text", "verify --model @converted --original +llama --data @absent.txt", kIo, {"absent.txt"}},
      {"verify_negative_seed",
       "verify --model @converted --original +llama --data +heldout --seed -1",
       kUsage,
       {"--seed -1"}},
      {"verify_no_samples",
       "verify --model @converted --original +llama --data +heldout --samples 0",
       kUsage,
       {"samples"}},
      {"verify_not_a_conversion",
       "verify --model +llama --original +llama --data +heldout",
       kBadInput,
       {"prose-llama"}},

      // report
      {"report_missing_run", "report --run @absent", kIo, {"absent"}, true},
      {"report_empty_run", "report --run @empty-folder", kBadInput, {"empty-folder"}, true},
      {"report_no_run_named", "report", kUsage, {"run"}},

      // generate
      {"generate_missing_model", "generate --model @absent --prompt Hello", kIo, {"absent"}},
      {"generate_truncated_model",
       "generate --model @truncated-weights --prompt Hello",
       kBadInput,
       {"model.safetensors"}},
      {"generate_on_two_ranks", "generate --model +llama --prompt Hello", kUsage, {"one rank"}, true},
      {"generate_no_tokenizer", "generate --model @no-tokenizer --prompt Hello", kIo, {"tokenizer"}},
      {"generate_no_prompt", "generate --model +llama", kUsage, {"prompt"}},
      {"generate_no_tokens", "generate --model +llama --prompt Hello --max-new-tokens 0", kUsage, {"max-new-tokens"}},
      {"generate_negative_seed", "generate --model +llama --prompt Hello --seed -1", kUsage, {"--seed -1"}},
      {"generate_cold", "generate --model +llama --prompt Hello --temperature -1", kUsage, {"temperature"}},
  };
  return list;
}

Arguments expand(const std::string& text, const fs::path& output) {
  const std::map<std::string, fs::path> good = {{"+llama", demo_model("prose-llama")},
                                                {"+bloom", demo_model("prose-bloom")},
                                                {"+text", demo_text("calibration.jsonl")},
                                                {"+heldout", demo_text("heldout.jsonl")},
                                                {"+golden", testing_support::golden_folder() / "llama-mha"}};
  Arguments arguments;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(' ', at), text.size());
    std::string word = text.substr(at, end - at);
    if (word.starts_with("@")) word = Inputs::get().root / word.substr(1);
    if (word.starts_with("%")) word = output.string() + word.substr(1);
    if (good.contains(word)) word = good.at(word);
    arguments.push_back(word);
    at = end + 1;
  }
  return arguments;
}

/// Relative names of everything below a folder.
std::vector<std::string> listing(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    names.push_back(fs::relative(entry.path(), folder));
  std::sort(names.begin(), names.end());
  return names;
}

class Errors : public testing::TestWithParam<Case> {};

void expect_failure(const Case& one, int ranks) {
  const fs::path& root = Inputs::get().root;
  const fs::path folder =
      fs::temp_directory_path() / fmt::format("headfold-case-{}-{}-{}", ::getpid(), one.name, ranks);
  fs::create_directories(folder);
  const fs::path log = root.parent_path() / fmt::format("headfold-case-{}-{}.log", ::getpid(), one.name);
  const std::vector<std::string> inputs_before = listing(root);
  const Outcome outcome = run_headfold(ranks, expand(one.arguments, folder / "out"), log, 40);
  EXPECT_EQ(outcome.code, one.code) << (outcome.code == 124 ? "HANGS\n" : "") << outcome.output;
  for (const std::string& text : one.mentions) EXPECT_THAT(outcome.output, testing::HasSubstr(text));
  // Nobody else's stack trace or unhandled exception passes for a message.
  EXPECT_THAT(outcome.output, testing::Not(testing::HasSubstr("terminate called")));
  EXPECT_THAT(listing(folder), testing::IsEmpty()) << "something was left behind";
  EXPECT_EQ(listing(root), inputs_before) << "something was left among the inputs";
  std::error_code code;
  fs::remove_all(folder, code);
  fs::remove(log, code);
}

// The checks are the same code at any rank count, so a case that ends two ranks is not repeated on one.
TEST_P(Errors, on_one_rank) {
  expect_failure(GetParam(), 1);
}

TEST(KilledRun, leaves_a_folder_that_the_same_command_may_write_again) {
  const fs::path folder = fs::temp_directory_path() / fmt::format("headfold-killed-{}", ::getpid());
  // What a conversion leaves that was killed while it wrote.
  write_file(folder / "out" / checkpoint::kUnfinishedMarker, "");
  write_file(folder / "out" / "model.safetensors.tmp", "half");
  write_file(folder / "out" / "model-00001-of-00002.safetensors.tmp", "half");
  const std::vector<std::string> command = {"convert",    "--model",     demo_model("prose-llama"),
                                            "--kv-heads", "4",           "--keys",
                                            "meanpool",   "--values",    "meanpool",
                                            "--out",      folder / "out"};
  const Outcome outcome = run_headfold(1, command, folder / "log");
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_EQ(listing(folder / "out"),
            (std::vector<std::string>{"config.json", "convert.json", "generation_config.json", "headfold.json",
                                      "model.safetensors", "tokenizer.model"}));
  fs::remove_all(folder);
}

class ErrorsOfTwoRanks : public testing::TestWithParam<Case> {};
TEST_P(ErrorsOfTwoRanks, end_the_whole_job) {
  expect_failure(GetParam(), 2);
}

std::vector<Case> cases_on(bool two_ranks) {
  std::vector<Case> chosen;
  for (const Case& one : cases())
    if (one.two_ranks == two_ranks) chosen.push_back(one);
  return chosen;
}

INSTANTIATE_TEST_SUITE_P(Job, Errors, testing::ValuesIn(cases_on(false)),
                         [](const auto& one) { return one.param.name; });
INSTANTIATE_TEST_SUITE_P(Job, ErrorsOfTwoRanks, testing::ValuesIn(cases_on(true)),
                         [](const auto& one) { return one.param.name; });

}  // namespace
}  // namespace headfold::end_to_end
