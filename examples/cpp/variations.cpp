// variations of a picture in C++, by the model that `semantica export --one-file` writes
// usage: variations MODEL.onnx PICTURE.ppm OUT.ppm [COUNT=4] [STEPS=20] [GUIDANCE=1.5] [NOISE.f32]
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using Shape = std::vector<int64_t>;

// a binary PPM: its bytes, and its sides
std::vector<uint8_t> read_ppm(const std::string& path, int64_t& width, int64_t& height) {
    std::ifstream file(path, std::ios::binary);
    std::string kind, comment;
    int64_t most = 0;
    for (file >> kind >> std::ws; file.peek() == '#'; file >> std::ws) std::getline(file, comment);
    if (!(file >> width >> height >> most) || kind != "P6" || most != 255 || width < 1 || height < 1)
        throw std::runtime_error(path + " is no binary PPM with 8 bits");
    file.get();
    std::vector<uint8_t> bytes(3 * width * height);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), bytes.size()))
        throw std::runtime_error(path + " ends too early");
    return bytes;
}

// standard normal numbers, drawn or from a file of float32
std::vector<float> read_noise(const char* path, size_t count) {
    std::vector<float> noise(count);
    if (path) {
        std::ifstream file(path, std::ios::binary);
        if (!file.read(reinterpret_cast<char*>(noise.data()), count * sizeof(float)))
            throw std::runtime_error(std::string(path) + " has fewer than " + std::to_string(count) + " numbers");
        return noise;
    }
    std::mt19937_64 source(std::random_device{}());
    std::normal_distribution<float> normal;
    for (float& value : noise) value = normal(source);
    return noise;
}

template <typename T>
Ort::Value tensor(std::vector<T>& values, const Shape& shape) {
    static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

int run(int argc, char** argv) {
    if (argc < 4)
        throw std::runtime_error("usage: variations MODEL PICTURE.ppm OUT.ppm [COUNT] [STEPS] [GUIDANCE] [NOISE.f32]");
    const int64_t count = argc > 4 ? std::atoll(argv[4]) : 4;
    std::vector<int64_t> steps{argc > 5 ? std::atoll(argv[5]) : 20};
    std::vector<float> guidance{argc > 6 ? std::strtof(argv[6], nullptr) : 1.5f};

    Ort::Env env;
    Ort::Session session(env, argv[1], Ort::SessionOptions{});
    Shape picture_shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    Shape noise_shape = session.GetInputTypeInfo(1).GetTensorTypeAndShapeInfo().GetShape();
    picture_shape[0] = noise_shape[0] = count;

    int64_t width, height;
    const std::vector<uint8_t> picture = read_ppm(argv[2], width, height);
    if (width != picture_shape[2] || height != picture_shape[1])
        throw std::runtime_error(std::string(argv[2]) + " is not as large as the model's picture");
    // one picture for each variation, and noise of its own
    std::vector<uint8_t> pictures;
    for (int64_t i = 0; i < count; i++) pictures.insert(pictures.end(), picture.begin(), picture.end());
    const int64_t numbers = count * noise_shape[1] * noise_shape[2] * noise_shape[3];
    std::vector<float> noise = read_noise(argc > 7 ? argv[7] : nullptr, numbers);

    const std::array<const char*, 4> names{"image", "noise", "steps", "guidance"};
    const char* output = "images";
    const std::array<Ort::Value, 4> inputs{tensor(pictures, picture_shape), tensor(noise, noise_shape),
                                           tensor(steps, {}), tensor(guidance, {})};
    const auto made = session.Run(Ort::RunOptions{}, names.data(), inputs.data(), inputs.size(), &output, 1);

    const Shape shape = made[0].GetTensorTypeAndShapeInfo().GetShape();
    std::ofstream out(argv[3], std::ios::binary);
    // the variations one under the other
    out << "P6\n" << shape[2] << ' ' << shape[0] * shape[1] << "\n255\n";
    out.write(reinterpret_cast<const char*>(made[0].GetTensorData<uint8_t>()), shape[0] * shape[1] * shape[2] * 3);
    return out.flush() ? 0 : throw std::runtime_error(std::string("cannot write ") + argv[3]);
}

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
