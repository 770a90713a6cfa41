#include "training/head_loss.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/bfloat16.hpp"
#include "kernels/head_loss.hpp"

namespace gossamer {

using head_loss::number;

namespace {

constexpr double kSmallest = 1e-9, kNaN = std::numeric_limits<double>::quiet_NaN();

void put(float& z, double x) { z = float(x); }
void put(std::uint16_t& z, double x) { z = std::isnan(x) ? 0x7FC0 : scalar::nearest_bf16(float(x)); }

// One thread's rows, of logits of type T, and its room for what is looked up in them: the K tokens of the
// teacher, and behind them the target.
template <class T>
class Rows {
  public:
    Rows(const HeadLossTask& task, Isa isa)
        : task_(task),
          kernels_(find_head_loss(task.values, isa)),
          floats_(find_head_loss(Values::f32, isa)),
          own_(std::size_t(task.K) + 1),
          soft_(own_.size()),
          p_K_(std::size_t(task.K)) {}

    HeadLossSums run(int n) {
        const int V = task_.V, K = task_.K;
        T* z_V = static_cast<T*>(task_.logits_NV) + std::size_t(n) * V;
        const std::int64_t target = task_.targets_N[n];
        const std::int64_t* ids_K = task_.ids_NK + std::size_t(n) * K;
        const float highest = kernels_.peak(z_V, V);
        if (!std::isfinite(highest)) {
            for (int v = 0; v < V; ++v) put(z_V[v], kNaN);
            return {kNaN, kNaN};
        }
        const double total = kernels_.total(z_V, V, {highest, 1});
        const double w = task_.weight;
        const double cross_entropy = std::log(total) - (number(z_V[target]) - double(highest));
        for (int k = 0; k < K; ++k) own_[k] = number(z_V[ids_K[k]]);
        own_[K] = number(z_V[target]);
        if (!task_.has_teacher) {
            floats_.gradient(own_.data(), 1, {highest, 1, 0, 1});
            kernels_.gradient(z_V, V, {highest, float(w / total), 0, 1});
            put(z_V[target], w * (own_[K] / total - 1));
            return {cross_entropy, w * cross_entropy};
        }
        const double t = task_.temperature;
        const Softmax softmax{highest, float(1 / t)};
        const double soft_total = t == 1 ? total : kernels_.total(z_V, V, softmax);
        const Others others = learn(task_.log_p_NK + std::size_t(n) * K, softmax, soft_total);
        // What is written over all tokens is right for the others, and then mended for the K and the target.
        const double own = w / total, soft = t * others.share / soft_total;
        const LogitsGradient apart{highest, float(own), float(soft), softmax.inverse_temperature};
        kernels_.gradient(z_V, V, t == 1 ? LogitsGradient{highest, float(own + soft), 0, 1} : apart);
        double of_target = own_[K] * own + soft_[K] * soft;
        for (int k = 0; k < K; ++k) {
            const double found = own_[k] * own + t * (soft_[k] / soft_total - p_K_[k]);
            put(z_V[ids_K[k]], found);
            if (ids_K[k] == target) of_target = found;
        }
        put(z_V[target], of_target - w);
        return {cross_entropy, w * cross_entropy + t * t * others.divergence};
    }

  private:
    struct Others {
        double divergence, share;  // of all tokens; 1 - p' / s'
    };

    // Makes powers of the logits that were looked up (own_): exp(z - highest) there, and in soft_ those by
    // the temperature; and p of its logarithms.
    Others learn(const float* log_p_K, const Softmax& softmax, double soft_total) {
        const int K = task_.K;
        double divergence = 0, log_total = std::log(soft_total), p_rest = 1, s_rest = soft_total;
        std::copy_n(log_p_K, K, p_K_.data());
        floats_.gradient(p_K_.data(), K, {0, 1, 0, 1});
        for (int k = 0; k < K; ++k) {
            const float scaled = (own_[k] - softmax.highest) * softmax.inverse_temperature;
            divergence += p_K_[k] * (log_p_K[k] - (scaled - log_total));
        }
        std::copy(own_.begin(), own_.end(), soft_.begin());
        floats_.gradient(own_.data(), K + 1, {softmax.highest, 1, 0, 1});
        floats_.gradient(soft_.data(), K + 1, {softmax.highest, 0, 1, softmax.inverse_temperature});
        // The K powers are, to the bit, what they added to the total: nothing is lost by taking them away.
        for (int k = 0; k < K; ++k) {
            p_rest -= p_K_[k];
            s_rest -= soft_[k];
        }
        p_rest = std::max(p_rest, kSmallest);
        s_rest = std::max(s_rest / soft_total, kSmallest);
        return {divergence + p_rest * std::log(p_rest / s_rest), 1 - p_rest / s_rest};
    }

    HeadLossTask task_;
    const HeadLossKernels& kernels_;
    const HeadLossKernels& floats_;
    std::vector<float> own_, soft_, p_K_;
};

template <class T>
HeadLossSums sum_rows(const HeadLossTask& task, Team& team, Isa isa) {
    std::vector<Rows<T>> rows(std::size_t(team.size()), Rows<T>(task, isa));
    std::vector<HeadLossSums> found_N(std::size_t(task.N));
    team.run([&](int thread) {
        const Part part(task.N, thread, team.size());
        for (int n = part.begin; n < part.end; ++n)
            found_N[std::size_t(n)] = rows[std::size_t(thread)].run(n);
    });
    HeadLossSums sums{0, 0};
    for (const auto& [cross_entropy, whole] : found_N) {
        sums.cross_entropy += cross_entropy;
        sums.whole += whole;
    }
    return sums;
}

}  // namespace

HeadLossSums head_loss_sums(const HeadLossTask& task, Team& team, Isa isa) {
    return task.values == Values::bf16 ? sum_rows<std::uint16_t>(task, team, isa)
                                       : sum_rows<float>(task, team, isa);
}

}  // namespace gossamer
