// Runs a packed model: forward DESCRIPTION MODEL.goss LOGITS
//
// The description is what Python reads of the header, in words (tests/native/test_other_processors.py writes
// it):
//
//   kv f32 | size FIELD NUMBER | name FIELD TENSOR | frequencies COUNT NUMBER... | ids COUNT ID...
//   block ROPE WINDOW, and of this block: is ROLE MATRIX | bias ROLE TENSOR | norm FIELD TENSOR
//   tensor NAME DTYPE OFFSET BYTES COUNT EXTENT... | matrix NAME STORAGE VALUES ROWS COLUMNS
//
// LOGITS gets the float32 logits of all ids, and then those of the last id once more, as a step by itself.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>

#include "engine/decoder.hpp"

namespace gossamer {
namespace {

struct Description {
    Packed packed;
    std::map<std::string, double> sizes;
    std::map<std::string, std::string> names;
    std::vector<float> frequencies;
    std::vector<BlockConfig> blocks;
    std::vector<std::int32_t> ids;
    Values kv = Values::f32;

    explicit Description(const char* path) {
        std::ifstream file(path);
        for (std::string word; file >> word;) read(word, file);
    }

    DecoderConfig decoder() const {
        const auto number = [&](const char* name) { return int(sizes.at(name)); };
        return {.hidden_size = number("hidden_size"),
                .vocab_size = number("vocab_size"),
                .num_heads = number("num_heads"),
                .num_kv_heads = number("num_kv_heads"),
                .head_dim = number("head_dim"),
                .intermediate_size = number("intermediate_size"),
                .norm_eps = float(sizes.at("norm_eps")),
                .inverse_frequencies = frequencies,
                .rotary_scale = float(sizes.at("rotary_scale")),
                .embedding = names.at("embedding"),
                .final_norm = names.at("final_norm"),
                .head = names.at("head"),
                .blocks = blocks};
    }

  private:
    void read(const std::string& word, std::istream& file) {
        std::string name, storage, values;
        if (word == "kv") {
            file >> values;
            kv = parse_values(values);
        } else if (word == "size") {
            file >> name;
            file >> sizes[name];
        } else if (word == "name") {
            file >> name;
            file >> names[name];
        } else if (word == "block") {
            file >> blocks.emplace_back().rope >> blocks.back().window;
        } else if (word == "is") {
            file >> name;
            file >> blocks.back().names.linears[name];
        } else if (word == "bias") {
            file >> name;
            file >> blocks.back().names.biases[name];
        } else if (word == "norm") {
            file >> name;
            file >> norm(blocks.back(), name);
        } else if (word == "frequencies") {
            frequencies = list<float>(file);
        } else if (word == "ids") {
            ids = list<std::int32_t>(file);
        } else if (word == "tensor") {
            file >> name;
            Tensor& tensor = packed.tensors[name];
            file >> tensor.dtype >> tensor.offset >> tensor.num_bytes;
            tensor.shape = list<std::size_t>(file);
        } else {
            file >> name >> storage >> values;
            MatrixEntry& matrix = packed.matrices[name];
            matrix.storage = parse_storage(storage);
            matrix.values = parse_values(values);
            file >> matrix.rows >> matrix.columns;
        }
    }
    static std::string& norm(BlockConfig& block, const std::string& name) {
        return name == "attention_norm"      ? block.attention_norm
               : name == "feed_forward_norm" ? block.feed_forward_norm
               : name == "query_norm"        ? block.query_norm
                                             : block.key_norm;
    }
    template <class T>
    static std::vector<T> list(std::istream& file) {
        std::size_t count = 0;
        file >> count;
        std::vector<T> items(count);
        for (T& item : items) file >> item;
        return items;
    }
};

int run(const char* description_path, const char* model_path, const char* logits_path) {
    Description description(description_path);
    std::ifstream model(model_path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(model)), std::istreambuf_iterator<char>());
    const Scratch file(bytes.size());
    std::copy(bytes.begin(), bytes.end(), file.bytes());
    description.packed.data = file.bytes();
    description.packed.num_bytes = bytes.size();

    ThreadPool pool(2);
    Decoder decoder(description.packed, description.decoder(), description.kv, pool);
    KvCache cache = decoder.new_cache(int(description.ids.size()) + 1);
    const std::span<const std::int32_t> ids(description.ids);
    std::vector<float> logits((ids.size() + 1) * std::size_t(decoder.padded_vocab()));
    const NewTokens all{&cache, ids, int(ids.size())}, last{&cache, ids.last(1)};
    decoder.forward({&all, 1}, logits.data());
    decoder.forward({&last, 1}, logits.data() + ids.size() * std::size_t(decoder.padded_vocab()));
    std::ofstream(logits_path, std::ios::binary)
        .write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size() * sizeof(float)));
    return 0;
}

}  // namespace
}  // namespace gossamer

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "usage: forward DESCRIPTION MODEL.goss LOGITS\n";
        return 2;
    }
    return gossamer::run(arguments[1], arguments[2], arguments[3]);
}
