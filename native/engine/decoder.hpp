// A decoder: one call is one step, for a batch of sequences with any number of new tokens each.
//
// All threads run the step together. They share out the rows of matrices (linears.hpp) and the heads and
// positions of attention (attend.cpp), and meet at six barriers a block, four more when a pass has several
// tokens, and one more where the attention of a single long sequence is split. What the decoder is made of
// comes as data (weights.hpp). Results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "base/view.hpp"
#include "engine/kv_cache.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"
#include "engine/scratch.hpp"
#include "engine/weights.hpp"
#include "kernels/table.hpp"

namespace gossamer {

// New tokens of one sequence: ids at positions cache->length() and up. Logits are wanted of the last ones.
struct NewTokens {
    KvCache* cache;
    std::span<const std::int32_t> ids;
    int num_outputs = 1;
};

class Decoder {
  public:
    static constexpr int kMaxTokens = Linears::kMaxTokens;  // of one pass; longer prompts take several

    Decoder(const Packed& packed, DecoderConfig config, Values kv, ThreadPool& pool);

    KvCache new_cache(int capacity) const;

    // Appends the new tokens to their sequences and writes logits [rows, padded_vocab()] of those whose
    // logits are wanted, in order. Ids, capacities and numbers of outputs must have been checked.
    void forward(std::span<const NewTokens> batch, float* logits);

    // Seconds that the products of all blocks take for `num_tokens` (at most kMaxTokens) at once.
    double time_linears(int num_tokens);

    // Seconds that attention takes in all blocks, `repeats` times, for one new token of each of
    // `num_sequences` sequences of `context` positions, whose keys and values are made up.
    std::vector<double> time_attention(int context, int num_sequences, int repeats);

    // Bytes of weights that a step of one token reads.
    std::size_t bytes_per_step() const;

    // Bytes of the cached keys and values that the last token of `context` positions attends to.
    std::size_t attention_bytes(int context) const;

    int padded_vocab() const { return weights_.head.matrices[0].w.padded_rows(); }
    const DecoderConfig& config() const { return config_; }

  private:
    struct Token {
        std::int32_t id;
        int position;
    };
    struct Run {  // consecutive tokens of one sequence within a pass
        KvCache* cache;
        int first, count, position;
    };
    struct AttentionItem {  // tokens of a run at one key/value head, over some chunks of positions
        int run, head, first, count, begin, end;
        std::ptrdiff_t state;  // where its rows' states go, or -1: it has all chunks and writes the output
    };
    struct AttentionPlan {
        int window;
        std::vector<AttentionItem> items;
        std::vector<std::size_t> shares;  // items of thread i: shares[i] .. shares[i + 1]
    };
    struct Pass {
        std::vector<Token> tokens;
        std::vector<Run> runs;
        std::map<int, AttentionPlan> plans;  // by the window of the blocks that go by it
        std::vector<int> outputs;            // tokens whose logits are wanted
        float* logits;
    };

    int num_blocks() const { return int(config_.blocks.size()); }
    void run(Pass& pass);
    void plan_attention(Pass& pass);
    AttentionPlan plan_window(const Pass& pass, int window);
    void split(const Pass& pass, AttentionPlan& plan) const;
    std::size_t attention_scratch_floats_of_a_thread() const;
    void rotary_angles(const Pass& pass, int thread);
    void embed(const Pass& pass, int thread);
    void run_block(const Pass& pass, int index, int thread);
    void attend(const Pass& pass, int index, int thread);
    void store(const Pass& pass, int index, int thread);
    void prepare_heads(const Block& block, float* x_HE, const float* norm, int num_heads, int token) const;
    void attend_item(const Pass& pass, const AttentionItem& item, int index, int thread);
    void merge_states(const Pass& pass, const AttentionPlan& plan, int thread);
    void head(const Pass& pass, int thread);
    void normalize(const float* weight, const Group& group, int num_tokens, const int* rows, int thread);
    void add_to_hidden(const Group& group, int num_tokens, int thread);

    const DecoderConfig config_;
    ThreadPool& pool_;
    const VectorKernels& kernels_;
    const AttentionKernels& attention_;
    const KvLayout kv_;
    const DecoderWeights weights_;
    // From one token's row to the next, in floats.
    std::size_t hidden_stride_, q_stride_, kv_stride_, inner_stride_;
    Linears linears_;
    Scratch hidden_, q_, k_, v_, attended_, gate_, up_, product_, rows_, rotary_;
    Scratch attention_scratch_;            // of each thread
    std::vector<float> attention_states_;  // of rows whose chunks are split among threads
};

}  // namespace gossamer
