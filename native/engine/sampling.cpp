// Every filter keeps the logits from some value up, so the highest such value is all that choosing needs, and
// no logit is moved. The value is found by partitioning, as quickselect does: half of a half of ... the
// logits.

#include "engine/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace gossamer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kMaxLogits = 1 << 22;  // their masses add up to less than 2^63
constexpr int kSamples = 15;

using Numbers = std::span<const float>;

// A row of logits at a temperature.
class Scores {
  public:
    Scores(const SamplingKernels& kernels, Numbers logits, double temperature)
        : kernels_(kernels),
          temperature_(temperature),
          softmax_{check(kernels, logits), inverse(temperature)} {}

    float highest() const { return softmax_.highest; }
    std::uint64_t mass(Numbers x, float low = -kInfinity) const {
        return kernels_.mass(x.data(), int(x.size()), softmax_, low);
    }
    // The logit of a mass.
    float logit(double mass) const {
        const double logit = highest() + temperature_ * std::log(mass / double(kMassUnit));
        return float(std::max(logit, double(std::numeric_limits<float>::lowest())));
    }
    Numbers keep(Numbers x, float low, float high, float* kept) const {
        return {kept, std::size_t(kernels_.keep(x.data(), int(x.size()), low, high, kept))};
    }

  private:
    static float check(const SamplingKernels& kernels, Numbers logits) {
        if (logits.empty() || logits.size() > kMaxLogits) {
            throw EngineError("found " + std::to_string(logits.size()) + " logits; expected 1 .. " +
                              std::to_string(kMaxLogits));
        }
        const float highest = kernels.highest(logits.data(), int(logits.size()));
        if (!std::isfinite(highest)) {
            throw EngineError("found logits that are NaN or infinite; the model's weights may be damaged");
        }
        return highest;
    }

    // Finite and above 0 for every temperature, so that no product below is 0 * infinity.
    static float inverse(double temperature) {
        using Limits = std::numeric_limits<float>;
        return float(std::clamp(1.0 / temperature, double(Limits::min()), double(Limits::max())));
    }

    const SamplingKernels& kernels_;
    double temperature_;
    Softmax softmax_;
};

// The fewest highest numbers that reach a goal: those above `low`, and of those equal to it the last but
// `num_left_out`.
struct Cut {
    float low = -kInfinity;
    std::size_t num_left_out = 0;
};

float middle_of(Numbers x) {
    float samples[kSamples];
    for (std::size_t i = 0; i < kSamples; ++i) samples[i] = x[(2 * i + 1) * x.size() / (2 * kSamples)];
    std::nth_element(samples, samples + kSamples / 2, samples + kSamples);
    return samples[kSamples / 2];
}

// `measure` of a set of numbers is the sum of what it is for each; for all of x it is at least `goal`, above
// 0. Any first pivot will do; a good one leaves out most of x at once.
template <class Measure>
Cut cut(const Scores& scores, Numbers x, std::uint64_t goal, float pivot, Measure measure) {
    const std::unique_ptr<float[]> memory(new float[2 * x.size()]);
    float* const halves[] = {memory.get(), memory.get() + x.size()};
    for (int turn = 0;; turn ^= 1) {
        const Numbers above = scores.keep(x, std::nextafter(pivot, kInfinity), kInfinity, halves[turn]);
        const std::size_t num_above = above.size();
        const std::uint64_t reached = measure(above);
        if (reached >= goal) {
            x = above;
        } else {
            const Numbers below = scores.keep(x, -kInfinity, pivot, halves[turn]);
            const std::size_t num_equal = x.size() - num_above - below.size();
            const std::uint64_t missing = goal - reached, each = measure(Numbers(&pivot, 1));
            if (each * num_equal >= missing) return {pivot, num_equal - (missing + each - 1) / each};
            goal = missing - each * num_equal;
            x = below;
        }
        pivot = middle_of(x);
    }
}

Cut top_k(const Scores& scores, Numbers logits, int k) {
    if (k == 0 || std::size_t(k) >= logits.size()) return {};
    const auto count = [](Numbers x) { return std::uint64_t(x.size()); };
    return {cut(scores, logits, std::uint64_t(k), middle_of(logits), count).low, 0};
}

Cut top_p(const Scores& scores, Numbers logits, double p, Cut before) {
    if (p >= 1) return before;
    const auto mass = [&](Numbers x) { return scores.mass(x, before.low); };
    const std::uint64_t all = mass(logits);
    const double goal = p * double(all), left_out = double(all) - goal;
    // The logits with less than an even share of what may be left out are left out.
    const float pivot = std::max(before.low, scores.logit(left_out / double(logits.size())));
    return cut(scores, logits, std::clamp(std::uint64_t(std::ceil(goal)), std::uint64_t(1), all), pivot,
               mass);
}

Cut min_p(const Scores& scores, double p, Cut before) {
    if (p == 0) return before;
    const float low = scores.logit(p * double(kMassUnit));
    return low > before.low ? Cut{low, 0} : before;
}

// Where the running sum of masses passes `target`, which is less than all of them.
std::size_t find(const Scores& scores, Numbers logits, float low, std::uint64_t target) {
    std::size_t begin = 0;
    for (std::size_t step : {4096, 256, 16, 1}) {
        for (;; begin += step) {
            const Numbers next = logits.subspan(begin, std::min(step, logits.size() - begin));
            const std::uint64_t mass = scores.mass(next, low);
            if (target < mass) break;
            target -= mass;
        }
    }
    return begin;
}

// The places of the `count` highest numbers, the highest first, and of equals the first first. Few are asked
// for, so that nearly every number is compared with the lowest of those kept and nothing else.
std::vector<int> highest(Numbers x, std::size_t count) {
    count = std::min(count, x.size());
    std::vector<int> kept;
    kept.reserve(count + 1);
    for (std::size_t i = 0; i < x.size() && count > 0; ++i) {
        if (kept.size() == count && x[i] <= x[std::size_t(kept.back())]) continue;
        const auto lower = [&](float number, int place) { return number > x[std::size_t(place)]; };
        kept.insert(std::upper_bound(kept.begin(), kept.end(), x[i], lower), int(i));
        if (kept.size() > count) kept.pop_back();
    }
    return kept;
}

}  // namespace

int sample(const SamplingKernels& kernels, Numbers logits, const SamplingOptions& options, double uniform) {
    const Scores scores(kernels, logits, options.temperature);
    Cut kept = top_k(scores, logits, options.top_k);
    kept = top_p(scores, logits, options.top_p, kept);
    kept = min_p(scores, options.min_p, kept);
    std::vector<float> without_ties;
    if (kept.num_left_out > 0) {
        without_ties.assign(logits.begin(), logits.end());
        for (auto at = without_ties.begin(); kept.num_left_out > 0; --kept.num_left_out, ++at) {
            at = std::find(at, without_ties.end(), kept.low);
            *at = -kInfinity;
        }
        logits = without_ties;
    }
    const std::uint64_t all = scores.mass(logits, kept.low);
    return int(find(scores, logits, kept.low, std::min(std::uint64_t(uniform * double(all)), all - 1)));
}

LogProbabilities log_probabilities(const SamplingKernels& kernels, Numbers logits, int index,
                                   int num_likeliest) {
    const Scores scores(kernels, logits, 1.0);
    if (index < 0 || std::size_t(index) >= logits.size()) {
        throw EngineError("found token " + std::to_string(index) + "; expected 0 .. " +
                          std::to_string(logits.size() - 1));
    }
    if (num_likeliest < 0) {
        throw EngineError("found " + std::to_string(num_likeliest) +
                          " likeliest tokens to tell; expected 0 or more");
    }
    const double sum = double(scores.mass(logits)) / double(kMassUnit);
    const auto log_probability = [&](int token) {
        return double(logits[std::size_t(token)]) - double(scores.highest()) - std::log(sum);
    };
    LogProbabilities found{.of_token = log_probability(index), .likeliest = {}};
    for (int token : highest(logits, std::size_t(num_likeliest)))
        found.likeliest.emplace_back(token, log_probability(token));
    return found;
}

}  // namespace gossamer
