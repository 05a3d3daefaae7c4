// Rules that tasks share: Python's random numbers and strings, metrics. Expected values are CPython 3.11's.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/prompts.h>
#include <headfold/evaluation/python_random.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/tokenizer/utf8.h>

#include <cmath>

#include "world.h"

namespace headfold::evaluation {
namespace {

using testing::ElementsAre;
using Indices = std::vector<std::size_t>;

TEST(PythonRandom, vectors_of_cpython) {
  PythonRandom bits(1234);
  EXPECT_EQ(bits.getrandbits(32), 4150886329U);
  EXPECT_EQ(bits.getrandbits(32), 3342196574U);
  EXPECT_EQ(bits.getrandbits(32), 1892932127U);
  PythonRandom reals(1234);
  EXPECT_EQ(reals.random(), 0.9664535356921388);
  EXPECT_EQ(reals.random(), 0.4407325991753527);
  PythonRandom zero(0);
  EXPECT_EQ(zero.random(), 0.8444218515250481);
  EXPECT_EQ(zero.random(), 0.7579544029403025);
  EXPECT_EQ(zero.random(), 0.420571580830845);
  EXPECT_EQ(PythonRandom(4294967295U).random(), 0.6353574441341173);
}

TEST(PythonRandom, samples_of_cpython) {
  PythonRandom five(1234);
  EXPECT_EQ(five.sample(7473, 5), (Indices{6374, 3610, 957, 61, 742}));
  EXPECT_EQ(five.sample(7473, 5), (Indices{7462, 6610, 4769, 286, 5501}));
  PythonRandom six(1234);
  EXPECT_EQ(six.sample(7473, 6), (Indices{6374, 3610, 957, 61, 742, 7462}));
  EXPECT_EQ(six.sample(7473, 6), (Indices{6610, 4769, 286, 5501, 5677, 687}));
  EXPECT_EQ(PythonRandom(1234).sample(30, 5), (Indices{24, 14, 3, 0, 2}));
  EXPECT_EQ(PythonRandom(1234).sample(20, 5), (Indices{14, 3, 0, 2, 1}));
  // 10 of 40 from a pool and then, beyond the set's 85, by rejection.
  PythonRandom ten(1234);
  EXPECT_EQ(ten.sample(40, 10), (Indices{28, 7, 0, 5, 2, 36, 6, 22, 15, 37}));
  EXPECT_EQ(ten.sample(90, 10), (Indices{3, 2, 44, 82, 79, 61, 78, 59, 19, 11}));
  EXPECT_EQ(PythonRandom(77).sample(277, 25), (Indices{129, 166, 101, 123, 98,  58,  149, 243, 121, 74, 256, 1,  143,
                                                       14,  254, 88,  97,  259, 198, 93,  169, 164, 30, 22,  141}));
  EXPECT_EQ(PythonRandom(0).choices(10, 5), (Indices{8, 7, 4, 2, 5}));
  EXPECT_EQ(PythonRandom(1).choices(10, 5), (Indices{1, 8, 7, 2, 4}));
  EXPECT_TRUE(PythonRandom(1).sample(3, 0).empty());
  EXPECT_THROW(PythonRandom(1).sample(3, 4), InternalError);
  EXPECT_THROW(PythonRandom(1).randbelow(0), InternalError);
}

TEST(PythonText, capitalize_and_lower) {
  EXPECT_EQ(capitalize("He said OK. Bob"), "He said ok. bob");
  EXPECT_EQ(capitalize("ßa"), "Ssa");
  EXPECT_EQ(capitalize("ÉCOLE Žižek"), "École žižek");
  EXPECT_EQ(capitalize("ǆ"), "ǅ");
  EXPECT_EQ(capitalize("ﬁne"), "Fine");
  EXPECT_EQ(capitalize(""), "");
  EXPECT_EQ(lower("İ"), "i̇");
}

TEST(PythonText, sigma_at_the_end_of_a_word) {
  EXPECT_EQ(capitalize("ΟΔΥΣΣΕΥΣ"), "Οδυσσευς");
  EXPECT_EQ(capitalize("ΑΣ"), "Ας");  // the first letter, in title case by then, is still the one before the sigma
  EXPECT_EQ(lower("ΟΔΥΣΣΕΥΣ Σ."), "οδυσσευς σ.");
  EXPECT_EQ(lower("ΣΑΣ'Σ"), "σασ'ς");  // an apostrophe is looked past
  EXPECT_EQ(lower("1Σ"), "1σ");
  // Twenty thousand texts made by the same generator in Python, and what CPython (Unicode 14) makes of them.
  const std::vector<std::string> pieces = {"Σ", "Σ",        "α",        "A",  "ά", "1", " ",
                                           ".", "\xCC\x81", "'",        "ʰ",  "ª", "-", "ß",
                                           "𝐀", "İ",        "\xC2\xAD", "中", "_", "Ⓐ", "\xF3\xA0\x80\x81"};
  PythonRandom random(11);
  Sha256 hash;
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (std::uint32_t n = random.randbelow(9); n > 0; --n)
      text += pieces[random.randbelow(static_cast<std::uint32_t>(pieces.size()))];
    hash.update(text + "|" + lower(text) + "|" + capitalize(text) + std::string(1, '\0'));
  }
  EXPECT_EQ(hash.hex(), "86dc7f7def48cf288c37d0f2f24c6f13c88395ef5f47ed900fe919a5776c7154");
}

// All characters at once: hashes of the texts that CPython (Unicode 14) makes of them one by one.
TEST(PythonText, case_of_every_character) {
  std::string lowered, titled;
  for (char32_t c = 1; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    tokenizer::append_utf8(text, c);
    lowered += lower(text);
    titled += capitalize(text);
  }
  EXPECT_EQ(sha256_hex(lowered), "56336fe4d8e39a1bdd93140912c93156d7b2fce979b7796ab910da7d086c2283");
  EXPECT_EQ(sha256_hex(titled), "16063b1333bdda88fc64e63c5ab2f53c05546b8bbe151b823fab1ecbec336093");
}

TEST(PythonText, small_rules) {
  EXPECT_EQ(code_points("naïve — ok"), 10);
  EXPECT_THAT(split_words("  a\xC2\xA0 b\n\tc "), ElementsAre("a", "b", "c"));
  EXPECT_THAT(split_on("a..b.", "."), ElementsAre("a", "", "b", ""));
  EXPECT_EQ(python_list({"a", "it's", "q\"q", "b'\"\\\n\t\xC3\xA9\x01"}),
            "['a', \"it's\", 'q\"q', 'b\\'\"\\\\\\n\\t\xC3\xA9\\x01']");
  EXPECT_EQ(hellaswag_text(" [header] A [title] b  c   d [x\n] e [y] "), " A. b c  d [x\n] e ");
  EXPECT_EQ(hellaswag_text("[]a"), "a");
}

TEST(Metrics, means_and_their_errors) {
  const std::vector<double> values = {1, 0, 0, 1, 1};
  EXPECT_DOUBLE_EQ(mean(values), 0.6);
  EXPECT_NEAR(mean_error(values).value(), std::sqrt(0.3 / 5), 1e-15);
  EXPECT_FALSE(mean_error({1.0}).has_value());
  EXPECT_DOUBLE_EQ(perplexity({std::log(0.5), std::log(0.125)}), 4.0);
}

// Values of the formula computed with CPython's random and floats.
TEST(Metrics, bootstrap_is_the_harness_s) {
  const std::vector<double> values = {-0.5, -1.25, -3.0, -0.125, -2.5, -7.0, -0.75};
  EXPECT_NEAR(perplexity(values), 8.677333540771178, 1e-14);
  EXPECT_NEAR(bootstrap_error(values, 3000, perplexity).value(), 15.479073781488843, 1e-11);
  EXPECT_NEAR(bootstrap_error(values, 500, perplexity).value(), 17.807434532050028, 1e-11);
  EXPECT_FALSE(bootstrap_error(values, 0, perplexity).has_value());
  EXPECT_FALSE(bootstrap_error({-1.0}, 1000, perplexity).has_value());
}

TEST(Metrics, groups_weigh_by_samples) {
  const std::vector<GroupPart> parts = {{0.5, 0.05, 100}, {0.8, 0.02, 300}};
  EXPECT_DOUBLE_EQ(group_mean(parts, true), 0.725);
  EXPECT_DOUBLE_EQ(group_mean(parts, false), 0.65);
  const double pooled = std::sqrt((99 * 0.05 * 0.05 * 100 + 299 * 0.02 * 0.02 * 300) / 398 / 400);
  EXPECT_NEAR(group_error(parts).value(), pooled, 1e-15);
  EXPECT_FALSE(group_error({{0.5, 0.05, 10}, {0.5, std::nullopt, 1}}).has_value());
}

TEST(Metrics, choices) {
  EXPECT_EQ(first_largest({-2, -1, -1, -3}), 1);  // the first on ties
  // exp(-1) + exp(-3) against all, with a shift that underflows without the maximum taken out.
  const double right = std::exp(0.0) + std::exp(-2.0), all = right + std::exp(-1.0);
  EXPECT_NEAR(true_probability({-1001, -1002, -1003}, {1, 0, 1}), right / all, 1e-15);
  Item item;
  item.choices = {"née", "nee!"};  // 3 characters in 4 bytes, 4 in 4
  item.gold = 1;
  std::vector<Answer> answers(2);
  answers[0].log_likelihood = -3.1;
  answers[1].log_likelihood = -4.0;
  const auto score = choice_scorer({"acc", "acc_norm", "acc_bytes"})(item, answers).at(0);
  EXPECT_EQ(score.metrics,
            (std::vector<std::pair<std::string, double>>{{"acc", 0}, {"acc_norm", 1}, {"acc_bytes", 0}}));
}

TEST(Metrics, gsm8k_vectors) {
  EXPECT_EQ(gsm8k_normalized("$1,234."), "1234");
  EXPECT_EQ(gsm8k_normalized("blah\n#### 18"), "18");
  EXPECT_EQ(gsm8k_flexible("The total is $1,234. and 5"), "5");
  EXPECT_EQ(gsm8k_strict("so 4 eggs\n#### -1,2.5 left #### 9"), "-1,2.5");
  EXPECT_EQ(gsm8k_strict("####18"), "[invalid]");
  EXPECT_EQ(gsm8k_cot_strict("The answer is 6."), "6");
  EXPECT_EQ(gsm8k_cot_strict("The answer is 6"), "[invalid]");
}

// Twenty thousand texts of the pieces that matter, made by the same generator in Python and given to its re module.
TEST(Metrics, gsm8k_filters_are_python_s_expressions) {
  const std::vector<std::string> pieces = {"#### ",          "12", ",",  ".", "$", "-", " ", "0", "\n",
                                           "The answer is ", "a",  "7.", "B", "#", "$,"};
  PythonRandom random(5);
  Sha256 hash;
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (std::uint32_t n = random.randbelow(12); n > 0; --n)
      text += pieces[random.randbelow(static_cast<std::uint32_t>(pieces.size()))];
    hash.update(text + "|" + gsm8k_strict(text) + "|" + gsm8k_cot_strict(text) + "|" + gsm8k_flexible(text) + "|" +
                gsm8k_normalized(text) + std::string(1, '\0'));
  }
  EXPECT_EQ(hash.hex(), "e1ce7f5366114ca2a6e270d9fba065c2162e2e343b8801f4391958987068feb2");
}

TEST(Metrics, rouge) {
  const std::string fox = "The quick brown fox jumps over the lazy dog", dog = "The quick brown dog jumps on the log.";
  EXPECT_NEAR(rouge_n(fox, dog, 1), 0.7058823529411765, 1e-15);
  EXPECT_NEAR(rouge_n(fox, dog, 2), 0.26666666666666666, 1e-15);
  EXPECT_NEAR(rouge_l(fox, dog), 0.5882352941176471, 1e-15);
  EXPECT_NEAR(rouge_n("a b a b c", "b a b a", 1), 0.888888888888889, 1e-15);
  EXPECT_NEAR(rouge_n("a b a b c", "b a b a", 2), 0.5714285714285715, 1e-15);
  EXPECT_NEAR(rouge_l("a b a b c", "b a b a"), 0.6666666666666665, 1e-15);
  EXPECT_EQ(rouge_n("One.", "two", 1), 0);
  EXPECT_EQ(rouge_n("x", "", 2), 0);
  EXPECT_EQ(rouge_l("x", ""), 0);
}

TEST(Metrics, longbench) {
  EXPECT_NEAR(qa_f1("The cat sat, on a mat!", "cat on the mat"), 0.8571428571428571, 1e-15);
  EXPECT_NEAR(qa_f1("An Éclair — the best", "éclair best"), 0.8, 1e-15);
  EXPECT_EQ(qa_f1("", "x"), 0);
  EXPECT_EQ(qa_f1("Paris", "paris."), 1);
  EXPECT_NEAR(qa_f1("the year 1999 a.d.", "1999 AD"), 0.8, 1e-15);
  EXPECT_NEAR(longbench_rouge("The cat sat. The dog ran away.", "A cat sat on the mat. The dog ran."),
              0.6666666618666668, 1e-15);
  EXPECT_NEAR(longbench_rouge("one two three four", "four three two one"), 0.24999999500000009, 1e-15);
  EXPECT_NEAR(longbench_rouge("a b c. . d", "a c. d e f"), 0.5999999950000001, 1e-15);
  EXPECT_EQ(longbench_rouge("...", "x"), 0);
  EXPECT_DOUBLE_EQ(count_score("I count 3, not 4 or 3", "3"), 2.0 / 3);
  EXPECT_EQ(count_score("none", "3"), 0);
  EXPECT_EQ(retrieval_score("Paragraph 12", "Paragraph 12").value(), 1);
  EXPECT_EQ(retrieval_score("1 2", "see Paragraph 2").value(), 0.5);
  EXPECT_FALSE(retrieval_score("1", "Paragraph x").has_value());
  // Python's \d: decimal digits of every script, but no superscripts.
  EXPECT_DOUBLE_EQ(count_score("x١٢3 ٣ ４5 ² 𝟗", "٣"), 0.25);
  EXPECT_EQ(count_score("3²", "3"), 1);
  EXPECT_EQ(retrieval_score("in ٣", "Paragraph ٣").value(), 1);
  EXPECT_EQ(retrieval_score("1 ٣", "Paragraph 1").value(), 0.5);
  // "location" is part of "Other location" and is dropped when that is right.
  EXPECT_EQ(classification_score("Other location", "Other location", {"Other location", "location"}), 1);
  EXPECT_EQ(classification_score("Individual or location", "location", {"Individual", "location"}), 0.5);
  EXPECT_EQ(classification_score("x", "location", {"location"}), 0);
}

TEST(Limit, fraction_or_count) {
  EXPECT_EQ(limited_count(100, 0), 100);
  EXPECT_EQ(limited_count(100, 0.101), 11);  // rounded up
  EXPECT_EQ(limited_count(100, 7), 7);
  EXPECT_EQ(limited_count(100, 1), 1);
  EXPECT_EQ(limited_count(100, 1e18), 100);
  for (const double bad : std::vector<double>{-1.0, 1.5, std::nan(""), INFINITY})
    EXPECT_THROW(limited_count(100, bad), UsageError);
}

}  // namespace
}  // namespace headfold::evaluation
