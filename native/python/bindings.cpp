// The Python module gossamer._native: see src/gossamer/_native.pyi for its contract.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <set>

#include "engine/decoder.hpp"
#include "engine/packed.hpp"
#include "engine/sampling.hpp"
#include "python/arrays.hpp"
#include "python/model.hpp"

namespace gossamer {

using namespace nb::literals;

namespace {

constexpr std::size_t kUncachedBytes = 256 << 20;

// The cached keys and values of one conversation.
class Sequence {
  public:
    Sequence(const void* model, KvCache cache) : model_(model), cache_(std::move(cache)) {}

    int length() const { return cache_.length(); }
    int capacity() const { return cache_.capacity(); }
    void truncate(int length) {
        if (length < 0 || length > cache_.length()) {
            throw EngineError("cannot truncate a sequence of " + std::to_string(cache_.length()) +
                              " tokens to " + std::to_string(length));
        }
        cache_.set_length(length);
    }
    bool belongs_to(const void* model) const { return model_ == model; }
    KvCache& cache() { return cache_; }

  private:
    const void* model_;
    KvCache cache_;
};

class Model {
  public:
    Model(Bytes buffer, nb::dict tensors, nb::dict config, int num_threads, const std::string& kv)
        : buffer_(buffer), pool_(std::clamp(num_threads, 1, 1024)) {
        const Packed packed = read_packed(buffer, tensors, matrix_table(config));
        DecoderConfig shape = read_decoder_config(config);
        const Values kv_values = parse_kv(kv);
        nb::gil_scoped_release unlocked;
        decoder_ = std::make_unique<Decoder>(packed, std::move(shape), kv_values, pool_);
    }

    std::unique_ptr<Sequence> new_sequence(int capacity) {
        if (capacity < 1) throw EngineError("a sequence needs a capacity of at least 1 token");
        return std::make_unique<Sequence>(this, decoder_->new_cache(capacity));
    }

    nb::ndarray<nb::numpy, float, nb::ndim<2>> forward(const std::vector<Sequence*>& sequences,
                                                       const std::vector<Ids>& ids, bool all_logits) {
        std::vector<NewTokens> batch = check(sequences, ids);
        std::size_t rows = 0;
        for (NewTokens& fresh : batch) {
            if (all_logits) fresh.num_outputs = int(fresh.ids.size());
            rows += std::size_t(fresh.num_outputs);
        }
        const std::size_t stride = std::size_t(decoder_->padded_vocab());
        std::unique_ptr<float[]> logits(new float[rows * stride]);
        {
            nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(mutex_);
            decoder_->forward(batch, logits.get());
        }
        return to_numpy(std::move(logits), rows, std::size_t(decoder_->config().vocab_size), stride);
    }

    // Of the last tokens of each sequence what is expected after them: the logarithm of the probability of
    // each target, and the likeliest tokens with theirs.
    nb::list score(const std::vector<Sequence*>& sequences, const std::vector<Ids>& ids,
                   const std::vector<Ids>& targets, int num_likeliest) {
        std::vector<NewTokens> batch = check(sequences, ids);
        if (targets.size() != batch.size()) {
            throw EngineError("found targets for " + std::to_string(targets.size()) + " of " +
                              std::to_string(batch.size()) + " sequences");
        }
        std::vector<int> wanted;
        for (std::size_t i = 0; i < batch.size(); ++i) {
            if (targets[i].size() > ids[i].size()) throw EngineError("found more targets than new tokens");
            batch[i].num_outputs = int(targets[i].size());
            wanted.insert(wanted.end(), targets[i].data(), targets[i].data() + targets[i].size());
        }
        check_ids(wanted);
        if (wanted.size() > std::size_t(Decoder::kMaxTokens)) {
            throw EngineError("found " + std::to_string(wanted.size()) + " targets; expected at most " +
                              std::to_string(Decoder::kMaxTokens));
        }
        const std::size_t stride = std::size_t(decoder_->padded_vocab());
        const std::size_t vocab = std::size_t(decoder_->config().vocab_size);
        std::vector<LogProbabilities> scores;
        {
            nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(mutex_);
            const std::unique_ptr<float[]> logits(new float[wanted.size() * stride]);
            decoder_->forward(batch, logits.get());
            for (std::size_t row = 0; row < wanted.size(); ++row) {
                const std::span<const float> of_row(logits.get() + row * stride, vocab);
                scores.push_back(log_probabilities(find_sampling(isa()), of_row, wanted[row], num_likeliest));
            }
        }
        nb::list found;
        for (const LogProbabilities& of : scores) found.append(nb::make_tuple(of.of_token, of.likeliest));
        return found;
    }

    std::vector<double> time_linears(int repeats, int num_tokens) {
        if (num_tokens < 1 || num_tokens > Decoder::kMaxTokens) {
            throw EngineError("found " + std::to_string(num_tokens) + " tokens; expected 1 .. " +
                              std::to_string(Decoder::kMaxTokens));
        }
        nb::gil_scoped_release unlocked;
        const std::lock_guard<std::mutex> lock(mutex_);
        std::vector<double> seconds;
        for (int i = 0; i < repeats; ++i) seconds.push_back(decoder_->time_linears(num_tokens));
        return seconds;
    }

    // Bytes of keys and values, more than caches hold, and the seconds of every repeat.
    nb::tuple time_attention(int context, int repeats) {
        if (context < 1 || repeats < 1) throw EngineError("expected a context and repeats of at least 1");
        const std::size_t sequence = decoder_->attention_bytes(context);
        const int sequences =
            int(std::clamp<std::size_t>(kUncachedBytes / sequence + 1, 1, Decoder::kMaxTokens));
        std::vector<double> seconds;
        {
            nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(mutex_);
            seconds = decoder_->time_attention(context, sequences, repeats);
        }
        return nb::make_tuple(sequence * std::size_t(sequences), seconds);
    }

    std::size_t bytes_per_step() const { return decoder_->bytes_per_step(); }
    int num_threads() const { return pool_.size(); }

  private:
    void check_ids(std::span<const std::int32_t> ids) const {
        for (std::int32_t id : ids) {
            if (id < 0 || id >= decoder_->config().vocab_size) {
                throw EngineError("found token id " + std::to_string(id) + "; expected 0 .. " +
                                  std::to_string(decoder_->config().vocab_size - 1));
            }
        }
    }

    std::vector<NewTokens> check(const std::vector<Sequence*>& sequences, const std::vector<Ids>& ids) const {
        if (sequences.size() != ids.size() || sequences.empty()) {
            throw EngineError("found " + std::to_string(sequences.size()) + " sequences and " +
                              std::to_string(ids.size()) +
                              " arrays of ids; expected as many of each, at least one");
        }
        std::vector<NewTokens> batch;
        std::set<const Sequence*> seen;
        for (std::size_t i = 0; i < sequences.size(); ++i) {
            Sequence* sequence = sequences[i];
            if (sequence == nullptr || !sequence->belongs_to(this))
                throw EngineError("a sequence belongs to another model");
            if (!seen.insert(sequence).second) throw EngineError("a sequence occurs twice in one step");
            if (ids[i].size() == 0) throw EngineError("a sequence has no new tokens; expected at least one");
            if (ids[i].size() > std::size_t(sequence->capacity() - sequence->length())) {
                throw EngineError("found " + std::to_string(sequence->length()) + " + " +
                                  std::to_string(ids[i].size()) + " tokens; the sequence holds " +
                                  std::to_string(sequence->capacity()));
            }
            const std::span<const std::int32_t> tokens(ids[i].data(), ids[i].size());
            check_ids(tokens);
            batch.push_back({&sequence->cache(), tokens});
        }
        return batch;
    }

    Bytes buffer_;  // keeps the memory map alive
    ThreadPool pool_;
    std::unique_ptr<Decoder> decoder_;
    std::mutex mutex_;
};

// Raises gossamer.errors.<kind> for the C++ errors of view.hpp.
void raise_python(const char* kind, const char* message) {
    const nb::object type = nb::module_::import_("gossamer.errors").attr(kind);
    PyErr_SetString(type.ptr(), message);
}

void translate(const std::exception_ptr& error, void*) {
    try {
        std::rethrow_exception(error);
    } catch (const FormatError& e) {
        raise_python("FormatError", e.what());
    } catch (const EngineError& e) {
        raise_python("EngineError", e.what());
    } catch (const ConfigError& e) {
        raise_python("ConfigError", e.what());
    } catch (const UnsupportedError& e) {
        raise_python("UnsupportedError", e.what());
    }
}

}  // namespace

NB_MODULE(_native, m) {
    nb::register_exception_translator(translate);
    // What a run still holds when the interpreter ends (an interrupted one: a whole graph) is no leak.
    nb::set_leak_warnings(false);
    nb::class_<Sequence>(m, "Sequence")
        .def_prop_ro("length", &Sequence::length)
        .def_prop_ro("capacity", &Sequence::capacity)
        .def("truncate", &Sequence::truncate, "length"_a);
    nb::class_<Model>(m, "Model")
        .def(nb::init<Bytes, nb::dict, nb::dict, int, const std::string&>(), "buffer"_a, "tensors"_a,
             "config"_a, "num_threads"_a, "kv"_a = "f32")
        .def("new_sequence", &Model::new_sequence, "capacity"_a, nb::keep_alive<0, 1>())
        .def("forward", &Model::forward, "sequences"_a, "ids"_a, "all_logits"_a = false)
        .def("score", &Model::score, "sequences"_a, "ids"_a, "targets"_a, "num_likeliest"_a = 1)
        .def("time_linears", &Model::time_linears, "repeats"_a, "num_tokens"_a = 1)
        .def("time_attention", &Model::time_attention, "context"_a, "repeats"_a)
        .def_prop_ro("bytes_per_step", &Model::bytes_per_step)
        .def_prop_ro("num_threads", &Model::num_threads);
    bind_encoder(m);
    bind_kernels(m);
    bind_training(m);
}

}  // namespace gossamer
