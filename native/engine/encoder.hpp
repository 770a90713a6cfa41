// An encoder: one call makes hidden states of the tokens of texts, or a vector of each text.
//
// Texts lie one behind the other, without any padding, in passes of as many as fit. The products of a pass go
// through in slices of at most Linears::kMaxTokens tokens. In attention a thread takes some heads of some
// texts, and lays out the keys and values of one head in memory of its own. Results depend neither on the
// number of threads nor on which texts share a pass. Memory grows with the longest text so far.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "engine/encoder_weights.hpp"
#include "engine/kv_cache.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"
#include "engine/scratch.hpp"
#include "kernels/table.hpp"

namespace gossamer {

// The vector of a text: the mean or the maximum of its tokens' hidden states, or those of the first.
enum class Pooling { mean, max, cls };

// The Pooling of that name; ConfigError when there is none.
Pooling parse_pooling(const std::string& name);

// Tokens of some texts, one text behind the other: an id and a type of each token, the length of each text.
struct Texts {
    std::span<const std::int32_t> ids, types, lengths;
};

class Encoder {
  public:
    Encoder(const Packed& packed, EncoderConfig config, ThreadPool& pool);

    // Writes the hidden states [tokens, D] of all texts. Ids, types and lengths must have been checked.
    void hidden_states(const Texts& texts, float* h_TD);

    // Writes a vector [texts, D] of each text.
    void encode(const Texts& texts, Pooling pooling, float* vectors_ND);

    const EncoderConfig& config() const { return config_; }

  private:
    static constexpr int kPassTokens = 512;  // unless a single text has more

    struct Text {
        int first, length;  // rows of the pass
    };
    struct Pass {
        std::size_t first_text, first_token;  // of the batch
        int num_tokens;
        std::vector<Text> texts;
        // By window: heads of texts, text by text; those of thread i: shares[i] .. shares[i + 1].
        std::map<int, std::vector<int>> shares;
    };
    struct Buffers {  // of a pass
        Scratch hidden, q, k, v, attended;
    };

    template <class Finish>
    void run(const Texts& texts, Finish finish);
    void reserve(int num_tokens, int length);
    template <class Work>
    static void for_slices(int num_tokens, Work work);
    std::vector<int> split(const Pass& pass, int window) const;
    // A token's hidden states. Of a single token, which no barrier follows, every thread has its own.
    float* hidden(int token, int num_tokens, int thread) const {
        return buffers_->hidden.floats() + std::size_t(num_tokens == 1 ? thread : token) * hidden_stride_;
    }
    void embed(const Texts& texts, const Pass& pass, int thread);
    void run_block(const EncoderBlock& block, const Pass& pass, int thread);
    void attend(const EncoderBlock& block, const Pass& pass, int thread);
    void attend_head(const EncoderBlock& block, const Text& text, int head, int thread);
    void add_product(int row, float* h_D) const;
    float normalize(const LayerNorm& norm, const float* x_D, float* y_D) const;
    void prepare(const Group& group, const LayerNorm& norm, float* h_D, int token, int count, int thread);
    void pool_text(const Pass& pass, const Text& text, Pooling pooling, int thread, float* vector_D) const;

    const EncoderConfig config_;
    ThreadPool& pool_;
    const VectorKernels& kernels_;
    const AttentionKernels& attention_;
    const EncoderWeights weights_;
    // From one token's row to the next, in floats.
    std::size_t hidden_stride_, heads_stride_, inner_stride_;
    Linears linears_;
    std::unique_ptr<Buffers> buffers_;
    int num_rows_ = 0;                        // tokens that the buffers hold
    std::vector<std::vector<float>> angles_;  // of each rope: cosines and sines of positions from 0 on
    Scratch inner_, up_, product_;            // of a slice
    std::vector<KvCache> keys_values_;        // of each thread: one head of one text
    Scratch attention_scratch_, rows_;        // of each thread
};

}  // namespace gossamer
